"""Training checkpoints of other tools become folders that transformers and PEFT load, or are refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lory.adapters.checkpoints import (
    Weights,
    convert_lora_checkpoint,
    convert_model_checkpoint,
    holds_lora,
    parse_rename,
    read_weights,
)
from lory.runtime import UsageError

IDS = torch.tensor([[1, 5, 9, 30, 2]])


def make_model(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).to(dtype).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits


def make_base(folder: Path, weights: bool = True, tied: bool = False) -> Path:
    """The folder of another model of the same architecture, with a file that looks like a tokenizer's."""
    model = make_model(tied)
    (model if weights else model.config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"llm.{k}": v for k, v in state.items()}, "meta": {"iter": 5}, "message_hub": 1},
        lambda state: {"model_state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}},
        lambda state: {"module": {f"module._orig_mod.model.{k}": v for k, v in state.items()}, "step": 3},
    ],
    ids=["plain", "xtuner", "ddp", "compiled"],
)
def test_a_models_state_dict_becomes_a_folder_with_its_logits(tmp_path: Path, wrap: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    weights = read_weights(save(wrap(model.state_dict()), tmp_path / "model.pth"))
    convert_model_checkpoint(weights, make_base(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


def test_what_lies_beside_the_weights_is_told(tmp_path: Path) -> None:
    path = save({"state_dict": {"a": torch.ones(1)}, "optimizer": {}, "epoch": 3}, tmp_path / "x.pth")
    assert read_weights(path).left_out == ("optimizer", "epoch")


def test_a_config_without_weights_is_enough(tmp_path: Path) -> None:
    model = make_model()
    weights = read_weights(save(model.state_dict(), tmp_path / "model.pth"))
    convert_model_checkpoint(weights, make_base(tmp_path / "base", weights=False), tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(("fp32", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_precision_is_the_files_or_fp32_and_the_config_says_so(tmp_path: Path, fp32: bool, expected: Any) -> None:
    state = make_model(dtype=torch.bfloat16).state_dict()
    weights = read_weights(save(state, tmp_path / "model.pth"))
    convert_model_checkpoint(weights, make_base(tmp_path / "base"), tmp_path / "out", fp32=fp32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {expected}
    assert model.dtype == expected
    assert all(torch.equal(tensor, state[name].to(expected)) for name, tensor in model.state_dict().items())


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    model = make_model()
    weights = read_weights(save(model.state_dict(), tmp_path / "model.pth"))
    files, _ = convert_model_checkpoint(weights, make_base(tmp_path / "base"), tmp_path / "out", max_shard_bytes=4000)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert files == len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 4000 for shard in shards)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_the_parts_of_an_old_hugging_face_folder_are_read_together(tmp_path: Path) -> None:
    model, folder = make_model(), tmp_path / "old"
    folder.mkdir()
    items = list(model.state_dict().items())
    save(dict(items[:9]), folder / "pytorch_model-00001-of-00002.bin")
    save(dict(items[9:]), folder / "pytorch_model-00002-of-00002.bin")
    convert_model_checkpoint(read_weights(folder), make_base(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("with_weights", [True, False])
def test_a_tied_head_is_stored_once_and_another_head_refused(tmp_path: Path, with_weights: bool) -> None:
    model = make_model(tied=True)
    base = make_base(tmp_path / "base", with_weights, tied=True)
    convert_model_checkpoint(Weights(dict(model.state_dict()), (), Path("x")), base, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    state = {**model.state_dict(), "lm_head.weight": torch.ones(37, 12)}
    with pytest.raises(UsageError, match="differs from the embeddings"):
        convert_model_checkpoint(Weights(state, (), Path("x")), base, tmp_path / "other")


def test_computed_buffers_are_left_out_and_told(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    state = {**make_model().state_dict(), name: torch.ones(3)}
    _, computed = convert_model_checkpoint(Weights(state, (), Path("x")), make_base(tmp_path / "base"), tmp_path / "o")
    assert computed == (name,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"lacks 'model\.norm\.weight'"),
        ({"value_head.weight": torch.ones(1)}, r"holds 'value_head\.weight'.*--ignore"),
        ({"model.embed_tokens.weight": torch.ones(40, 12)}, r"\(40, 12\) in .* and \(37, 12\)"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    state = {k: v for k, v in {**make_model().state_dict(), **change}.items() if v is not None}
    with pytest.raises(UsageError, match=message):
        convert_model_checkpoint(Weights(state, (), Path("x")), make_base(tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "llm.", "module."])
def test_an_xtuner_checkpoint_becomes_an_adapter_that_peft_loads(tmp_path: Path, prefix: str) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=["norm"]
    )
    model = peft.get_peft_model(make_model(), config).eval()
    model.base_model.model.model.norm.modules_to_save["default"].weight.data.mul_(1.5)
    parts = ("lora_", "modules_to_save")
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items() if any(part in k for part in parts)}
    weights = read_weights(save({"state_dict": state, "meta": {}}, tmp_path / "iter_500.pth"))
    assert holds_lora(weights)
    convert_lora_checkpoint(weights, tmp_path / "out", alpha=7)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()
    assert (logits(loaded) - logits(make_model())).abs().max() > 0.01
    torch.testing.assert_close(logits(loaded), logits(model))


def lora_keys(name: str, adapter: str = "default") -> dict[str, Tensor]:
    return {f"{name}.lora_A.{adapter}.weight": torch.ones(2, 3), f"{name}.lora_B.{adapter}.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lora_keys("llm.base_model.model.q") | lora_keys("visual.base_model.model.q"), "adapters of several models"),
        (
            lora_keys("llm.base_model.model.q") | {"projector.0.weight": torch.ones(1)},
            r"'projector\.0\.weight' outside",
        ),
        (lora_keys("q") | {"q.base_layer.weight": torch.ones(4, 3)}, r"'q\.base_layer\.weight' beside the adapter"),
        (lora_keys("q") | lora_keys("q", "other"), "adapters default, other; say which"),
        ({"q.lora_A.weight": torch.ones(2, 3)}, "no lora_A .* that match for 'q'"),
    ],
)
def test_what_has_no_place_in_an_adapter_is_refused_by_name(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert_lora_checkpoint(Weights(state, (), Path("x.pth")), tmp_path / "out", alpha=4)


def test_one_of_several_adapters_can_be_chosen(tmp_path: Path) -> None:
    state = lora_keys("q") | lora_keys("v", "other")
    made = convert_lora_checkpoint(Weights(state, (), Path("x")), tmp_path / "out", alpha=4, adapter_name="other")
    assert list(made.layers) == ["v"]


def test_names_are_changed_and_left_out_as_asked_and_no_rule_is_idle() -> None:
    weights = Weights({"net.a": torch.ones(1), "net.b": torch.ones(2), "tail": torch.ones(3)}, (), Path("x"))
    renamed = weights.rename([parse_rename(r"^net\.=model."), parse_rename("b$=c")]).ignore(["tail"])
    assert list(renamed.tensors) == ["model.a", "model.c"]
    assert renamed.left_out == ("tail",)
    for rules, message in ((["q="], "matches no name"), (["a=b"], "2 tensors of x are called 'net.b'")):
        with pytest.raises(UsageError, match=message):
            weights.rename([parse_rename(rule) for rule in rules])
    with pytest.raises(UsageError, match="matches no whole name"):
        weights.ignore(["net"])
    with pytest.raises(UsageError, match="broken regular expression"):
        parse_rename("(=x")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"'argparse\.Namespace', which is not unpickled"):
        read_weights(path)


def test_a_file_from_before_torch_1_6_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "x.pth").tensors["a"], torch.ones(1))


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "half.safetensors").write_bytes(b"123")
    save({"epoch": 3}, tmp_path / "none.pth")
    whole = save({"a": torch.ones(1000)}, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:2000])
    for name in ("text.pth", "half.safetensors", "none.pth", "cut.pth", "absent.pth"):
        with pytest.raises(UsageError, match=name):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], r"zero_to_fp32\.py"),
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "2 tensor-parallel parts"),
        (["notes.txt"], "neither pytorch_model"),
    ],
)
def test_a_folder_with_parts_of_tensors_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path)
