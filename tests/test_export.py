"""`export.merge`: what is written answers like base plus adapter, or is not written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM

from lory import export
from lory.adapters.files import load_adapter, save_adapter
from lory.adapters.inject import AdapterConfig, attach_lora
from lory.assistant import load
from lory.generate import GenerationOptions
from lory.models.load import load_model
from lory.models.resolve import Resolved, resolve
from lory.models.streamed import NotStreamable
from lory.runtime import LoryError, UsageError
from lory.training.config import Config
from lory.training.run import prepare

IDS = torch.tensor([[1, 5, 99, 300, 2, 17, 8]])
OPTIONS = GenerationOptions(max_new_tokens=31)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def load_plain(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def expected(tiny_model: Path, tiny_adapter: Path) -> torch.Tensor:
    """The logits of base plus adapter, by PEFT."""
    return logits(PeftModel.from_pretrained(load_plain(tiny_model), tiny_adapter).eval())


@pytest.fixture(scope="module")
def merged(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> export.Merged:
    """The tiny adapter, merged; do not write into its folder."""
    return export.merge(tiny_adapter, tmp_path_factory.mktemp("merged") / "model")


def corrupt(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the merge end with `change(tensors, base)` done to what it wrote."""
    whole = export.merge_shards

    def merge_shards(base: Path, adapter: Path, out: Path, *rest: Any) -> Any:
        report = whole(base, adapter, out, *rest)
        tensors = load_file(out / "model.safetensors")
        change(tensors, base)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return report

    monkeypatch.setattr(export, "merge_shards", merge_shards)


def test_merged_is_the_same_as_unmerged(merged: export.Merged, expected: torch.Tensor, tiny_model: Path) -> None:
    model = load_plain(merged.folder)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(load_plain(tiny_model))).abs().max() > 1
    assert merged.difference < 1e-5
    assert merged.report.merged == 14  # 7 linear layers in each of 2 layers


def test_a_merged_model_answers_and_streams_as_its_adapter_does(merged: export.Merged, tiny_adapter: Path) -> None:
    together, apart = load(merged.folder, device="cpu"), load(tiny_adapter, device="cpu")
    assert together.chat("Who are you?", OPTIONS) == apart.chat("Who are you?", OPTIONS) != ""
    assert "".join(together.stream("Who are you?", OPTIONS)) == apart.chat("Who are you?", OPTIONS)


def test_a_merged_model_is_a_whole_folder_for_transformers(merged: export.Merged, tiny_model: Path) -> None:
    tokenizer, own = (AutoTokenizer.from_pretrained(folder) for folder in (merged.folder, tiny_model))
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer.get_vocab() == own.get_vocab()
    assert load_plain(merged.folder).generation_config.eos_token_id == 2
    assert not list(merged.folder.glob("adapter*"))


def test_a_merged_model_can_be_trained_on(merged: export.Merged, records: Path) -> None:
    resolved = resolve(merged.folder)
    assert resolved.adapter is None
    data = {"train": [{"path": str(records)}], "max_tokens": 96}
    prepared = prepare(Config.model_validate({"model": {"path": str(merged.folder)}, "data": data}))
    assert prepared.dataset.train


def test_progress_ends_with_all_tensors(tiny_adapter: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = export.merge(tiny_adapter, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, result.report.tensors) for done in range(1, result.report.tensors + 1)]


def test_a_sharded_merge_is_the_same_model(tiny_adapter: Path, tmp_path: Path, expected: torch.Tensor) -> None:
    result = export.merge(tiny_adapter, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == result.report.shards > 3
    torch.testing.assert_close(logits(load_plain(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_merge_in_half_precision_is_as_near_as_rounding_lets_it(
    dtype: torch.dtype, error: float, tiny_adapter: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    result = export.merge(tiny_adapter, tmp_path / "out", dtype)
    assert 1e-5 < result.difference < error
    model = load_plain(tmp_path / "out", "auto")
    assert model.dtype == dtype
    assert (logits(model.float()) - expected).abs().max() < error * expected.abs().max()


def test_the_report_is_what_json_prints(merged: export.Merged) -> None:
    report = json.loads(json.dumps(merged.to_dict()))
    assert set(report) == {"folder", "tensors", "merged", "shards", "bytes", "difference"}
    assert report["bytes"] == sum(t.nbytes for t in load_file(merged.folder / "model.safetensors").values())


# What is refused


def add_noise(tensors: dict[str, torch.Tensor], base: Path) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-2 * torch.randn(40, 24)


def lose_an_update(tensors: dict[str, torch.Tensor], base: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name]


def spoil_a_token_of_the_last_prompt(tensors: dict[str, torch.Tensor], base: Path) -> None:
    prompts = export._random_prompts(resolve(base), torch.device("cpu"))
    token = int(prompts[-1][0, -1])
    assert not any((prompt == token).any() for prompt in prompts[:-1])
    tensors["model.embed_tokens.weight"][token] = float("nan")


@pytest.mark.parametrize("change", [add_noise, lose_an_update, spoil_a_token_of_the_last_prompt])
def test_a_merge_that_answers_otherwise_is_not_kept(
    change: Any, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, change)
    with pytest.raises(LoryError, match=r"differs from base and adapter by .* was not kept") as raised:
        export.merge(tiny_adapter, tmp_path / "out")
    assert raised.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.merge(tiny_adapter, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match="exists already; choose another folder"):
            export.merge(tiny_adapter, out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_empty_folder_is_filled(tiny_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export.merge(tiny_adapter, out)
    assert (out / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("device", ["bad", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(tiny_adapter: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(UsageError, match=f"The device '{device}' cannot be used here"):
        export.merge(tiny_adapter, tmp_path / "out", device=device)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_an_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="carries no adapter, so there is nothing to merge"):
        export.merge(tiny_model, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, folder)
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UsageError, match=r"layers\.9"):
        export.merge(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_the_comparison_is_with_base_and_adapter(tiny_adapter: Path, tiny_model: Path) -> None:
    with pytest.raises(LoryError, match="differs from base and adapter"):
        export.compare(resolve(tiny_adapter), tiny_adapter, tiny_model)
    model = load_plain(tiny_model)
    load_adapter(model, tiny_adapter)  # the adapter does change this model
    assert (logits(model) - logits(load_plain(tiny_model))).abs().max() > 1


# How it is compared: the weights are read as they are needed

STREAMED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"tie_word_embeddings": True},
    "Qwen2Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Rwkv": {"num_hidden_layers": 2},
}


def save_pair(model: Any, folder: Path, **settings: Any) -> Resolved:
    """Write a model in several files and a random adapter for it."""
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base, max_shard_size=10_000)
    attach_lora(model, AdapterConfig(rank=3, alpha=7, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    adapter.mkdir()
    save_adapter(model, adapter, str(base))
    return Resolved(str(adapter), str(base), base, adapter)


def answer_loaded(pair: Resolved, prompts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """What `_answer_streamed` gives, by loading the model as a whole."""
    assert pair.adapter is not None
    model = load_model(pair, "auto", torch.device("cpu"))
    base = export._logits(model, prompts)
    load_adapter(model, pair.adapter)
    return [base, export._logits(model, prompts)]


def assert_streams_the_same(pair: Resolved) -> None:
    prompts = export._random_prompts(pair, torch.device("cpu"))
    base, adapted = export._answer_streamed(pair.base_path, pair.adapter, prompts)
    whole = answer_loaded(pair, prompts)
    torch.testing.assert_close([base, adapted], whole, rtol=1e-6, atol=1e-6)
    assert export._distance(base, adapted) > 0.01
    assert [len(rows) for rows in base] == [prompt.shape[1] for prompt in prompts]


@pytest.mark.parametrize("family", STREAMED)
def test_a_streamed_model_answers_like_a_loaded_one(
    family: str, random_model: Callable[..., Any], tmp_path: Path
) -> None:
    assert_streams_the_same(save_pair(random_model(family, **STREAMED[family]), tmp_path))


def test_a_streamed_falcon_answers_like_a_loaded_one(tmp_path: Path) -> None:
    # fused queries, keys and values; linear layers of its own class
    config = FalconConfig(vocab_size=131, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    assert_streams_the_same(save_pair(FalconForCausalLM(config).eval(), tmp_path))


@pytest.mark.parametrize(
    "settings",
    [{}, {"type": "dora"}, {"targets": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "tied layers", "a whole module"],
)
def test_every_kind_of_adapter_streams_on_a_tied_model(
    settings: dict[str, Any], random_model: Callable[..., Any], tmp_path: Path
) -> None:
    assert_streams_the_same(save_pair(random_model("Llama", tie_word_embeddings=True), tmp_path, **settings))


def test_stored_buffers_are_read(random_model: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
    model = random_model("Glm4Moe", first_k_dense_replace=1, **sizes)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    assert_streams_the_same(save_pair(model, tmp_path))


def test_the_comparison_holds_one_module_at_a_time(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    whole = export.bring_weights

    def bring_weights(model: Any, fetch: Any) -> Any:
        def fetch_and_count(name: str) -> torch.Tensor:
            nonlocal largest
            held = sum(p.numel() for n, p in model.named_parameters() if not p.is_meta and "lora_" not in n)
            tensor: torch.Tensor = fetch(name)
            largest = max(largest, held + tensor.numel())
            return tensor

        return whole(model, fetch_and_count)

    monkeypatch.setattr(export, "bring_weights", bring_weights)
    monkeypatch.setattr(export, "load_model", None)
    resolved = resolve(tiny_adapter)
    export._answer(resolved, tiny_adapter, export._random_prompts(resolved, torch.device("cpu")))
    assert largest == 320 * 24  # the embeddings or the head, which are its largest tensors


def test_a_model_that_uses_weights_of_other_modules_is_loaded(
    random_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = save_pair(random_model("Mamba", state_size=4), tmp_path, targets=["in_proj"])
    prompts = export._random_prompts(pair, torch.device("cpu"))
    with pytest.raises(NotStreamable, match="does not run a module at a time"):
        export._answer_streamed(pair.base_path, pair.adapter, prompts)
    with caplog.at_level(logging.INFO, logger="lory"):
        found = export._answer(pair, pair.adapter, prompts)
    assert len([line for line in caplog.messages if "is loaded into memory as a whole, since it does" in line]) == 1
    torch.testing.assert_close(found, answer_loaded(pair, prompts), rtol=0, atol=0)


def test_a_tensor_that_is_not_stored_is_for_loading_to_refuse(random_model: Callable[..., Any], tmp_path: Path) -> None:
    pair = save_pair(random_model("Llama"), tmp_path)
    index = pair.base_path / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    del weights["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(weights))
    for path in pair.base_path.glob("*.safetensors"):
        tensors = load_file(path)
        tensors.pop("model.norm.weight", None)
        save_file(tensors, path, metadata={"format": "pt"})
    prompts = export._random_prompts(pair, torch.device("cpu"))
    with pytest.raises(NotStreamable, match=r"'model\.norm\.weight'"):
        export._answer_streamed(pair.base_path, None, prompts)
    with pytest.raises(UsageError, match=r"lacks 1 of the model's weights, model\.norm\.weight among them"):
        export._answer(pair, None, prompts)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_the_base_is_run_only_where_it_is_trusted(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, adapter = shutil.copytree(tiny_model, tmp_path / "base"), shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (base / "own_code.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    for path, changes in (
        (base / "config.json", {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}),
        (adapter / "adapter_config.json", {"base_model_name_or_path": str(base)}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=r"comes with Python code, .* --trust-remote-code"):
        export.merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "modules").exists()
    merged = export.merge(adapter, tmp_path / "out", trust_remote_code=True)
    assert merged.difference < 1e-5
    assert (tmp_path / "out" / "own_code.py").exists()
