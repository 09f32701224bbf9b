"""Files go both ways between lory and PEFT with equal logits, on many architectures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lory.adapters.files import load_adapter, save_adapter
from lory.adapters.inject import AdapterConfig, attach_lora

VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"type": "dora"}}
IDS = torch.tensor([[1, 5, 9, 30, 2, 7]])
Load = Callable[[str], Any]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of fan_in_fan_out and of tied weights, which are meant
        yield


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def randomize(model: nn.Module, part: str = "lora_") -> None:
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if part in key:
            # magnitudes stay near what they were
            parameter.mul_(1 + torch.rand_like(parameter)) if "magnitude" in key else parameter.normal_(std=0.2)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def targets_of(name: str, variant: str) -> str | list[str]:
    # PEFT has no DoRA on stacked experts, and takes these models' dense layers for experts
    return ["q_proj", "o_proj"] if variant == "dora" and name in ("mixtral", "qwen3-moe") else "all-linear"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_lory_saves_peft_answers_alike(
    architecture_name: str, variant: str, load_random: Load, tmp_path: Path
) -> None:
    model = load_random(architecture_name)
    before = logits(model)
    exclude = ["experts"] if architecture_name == "qwen2-moe" and variant == "dora" else []
    targets = targets_of(architecture_name, variant)
    attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=targets, exclude=exclude, **VARIANTS[variant]))
    assert_equal(logits(model), before)
    randomize(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    save_adapter(model, tmp_path, "base")
    assert_equal(logits(PeftModel.from_pretrained(load_random(architecture_name), tmp_path).eval()), expected)
    again = load_random(architecture_name)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saves_lory_answers_alike(
    architecture_name: str, variant: str, load_random: Load, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets_of(architecture_name, variant),
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
    )
    peft = get_peft_model(load_random(architecture_name), config).eval()
    randomize(peft)
    peft.save_pretrained(tmp_path)
    model = load_random(architecture_name)
    load_adapter(model, tmp_path)
    assert_equal(logits(model), logits(peft))


PATTERNS = {"rank_pattern": {"layers.0.*q_proj": 2, "down_proj": 5}, "alpha_pattern": {"v_proj": 3}}


def test_rank_and_alpha_patterns_mean_the_same(load_random: Load, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", **PATTERNS)
    peft = get_peft_model(load_random("llama"), config).eval()
    model = load_random("llama")
    attach_lora(model, AdapterConfig(rank=3, alpha=7, **PATTERNS))
    shapes = {key.replace(".default.weight", ""): p.shape for key, p in peft.base_model.model.named_parameters()}
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            assert parameter.shape == shapes[key]
    randomize(model)
    save_adapter(model, tmp_path, "base")
    assert_equal(logits(PeftModel.from_pretrained(load_random("llama"), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_and_heads_that_are_tied_go_both_ways(variant: str, load_random: Load, tmp_path: Path) -> None:
    for side in ("wte", "lm_head"):
        config = LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=[side],
            use_rslora=variant == "rslora",
            use_dora=variant == "dora",
        )
        peft = get_peft_model(load_random("gpt2"), config).eval()
        randomize(peft)
        expected = logits(peft)
        peft.save_pretrained(tmp_path / side)
        model = load_random("gpt2")
        load_adapter(model, tmp_path / side)
        assert_equal(logits(model), expected)
        # the other side keeps the shared weight as it was
        assert model.lm_head.weight.equal(model.transformer.wte.weight)

        model = load_random("gpt2")
        attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=[side], **VARIANTS[variant]))
        assert model.lm_head.weight is model.transformer.wte.weight
        randomize(model)
        (tmp_path / f"lory-{side}").mkdir()
        save_adapter(model, tmp_path / f"lory-{side}", "base")
        again = PeftModel.from_pretrained(load_random("gpt2"), tmp_path / f"lory-{side}").eval()
        assert_equal(logits(again), logits(model))


def test_adapters_that_peft_ties_are_read(load_random: Load, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["wte"], ensure_weight_tying=True)
    peft = get_peft_model(load_random("gpt2"), config).eval()
    randomize(peft)
    peft.save_pretrained(tmp_path)
    model = load_random("gpt2")
    load_adapter(model, tmp_path)
    assert_equal(logits(model), logits(peft))


@pytest.mark.parametrize("whole", ["lm_head", "wte", "ln_f"])
def test_modules_to_save_go_both_ways(whole: str, load_random: Load, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"], modules_to_save=[whole])
    peft = get_peft_model(load_random("gpt2"), config).eval()
    randomize(peft)
    randomize(peft, "modules_to_save")
    peft.save_pretrained(tmp_path / "peft")
    model = load_random("gpt2")
    load_adapter(model, tmp_path / "peft")
    assert_equal(logits(model), logits(peft))

    model = load_random("gpt2")
    attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=["c_attn"], modules_to_save=[whole]))
    learnt = {key for key, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in key}
    assert learnt
    assert all(whole in key for key in learnt)
    randomize(model)
    randomize(model, whole)
    (tmp_path / "lory").mkdir()
    save_adapter(model, tmp_path / "lory", "base")
    again = PeftModel.from_pretrained(load_random("gpt2"), tmp_path / "lory").eval()
    assert_equal(logits(again), logits(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_are_read(bias: Any, load_random: Load, tmp_path: Path) -> None:
    peft = get_peft_model(load_random("gpt2"), LoraConfig(r=3, target_modules=["c_attn"], bias=bias)).eval()
    randomize(peft)
    randomize(peft, "c_attn.base_layer.bias" if bias == "lora_only" else ".bias")
    peft.save_pretrained(tmp_path)
    model = load_random("gpt2")
    load_adapter(model, tmp_path)
    assert_equal(logits(model), logits(peft))
    save_adapter(model, tmp_path, "base")
    assert_equal(logits(PeftModel.from_pretrained(load_random("gpt2"), tmp_path).eval()), logits(peft))


class Pictures(nn.Module):
    """A small stack of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(4, 6, 3, stride=2)
        self.plane = nn.Conv2d(1, 5, (2, 3), padding=1)
        self.space = nn.Conv3d(1, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(x)[:, None]
        return self.space(self.plane(x)[:, None])


@pytest.mark.parametrize("variant", VARIANTS)
def test_convolutions_go_both_ways(variant: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 15)
    names = ["line", "plane", "space"]
    model = Pictures()
    attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=names, **VARIANTS[variant]))
    assert_equal(model(x), Pictures()(x))
    assert model.state_dict().keys() > Pictures().state_dict().keys()
    randomize(model)
    save_adapter(model, tmp_path, "base")
    assert_equal(PeftModel.from_pretrained(Pictures(), tmp_path)(x), model(x))

    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=names, use_rslora=variant == "rslora", use_dora=variant == "dora"
    )
    peft = get_peft_model(Pictures(), config).eval()
    randomize(peft)
    peft.save_pretrained(tmp_path / "peft")
    again = Pictures()
    load_adapter(again, tmp_path / "peft")
    assert_equal(again(x), peft(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_stored_as_a_plain_adapter_of_the_original_model(
    rslora: bool, load_random: Load, tmp_path: Path
) -> None:
    model = load_random("gpt2")
    before = logits(model)
    attach_lora(model, AdapterConfig(rank=3, alpha=7, init="pissa", rslora=rslora))
    assert_equal(logits(model), before)
    randomize(model)
    save_adapter(model, tmp_path, "base")
    assert_equal(logits(PeftModel.from_pretrained(load_random("gpt2"), tmp_path).eval()), logits(model))
    again = load_random("gpt2")
    load_adapter(again, tmp_path)
    assert_equal(logits(again), logits(model))


def test_pissa_learns_like_pefts(load_random: Load) -> None:
    peft = get_peft_model(load_random("llama"), LoraConfig(r=3, lora_alpha=7, init_lora_weights="pissa"))
    model = load_random("llama")
    attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=["q_proj", "v_proj"], init="pissa"))
    found = {key: p for key, p in model.named_parameters() if p.requires_grad}
    expected = {k.replace(".default.weight", ""): p for k, p in peft.base_model.model.named_parameters()}
    losses = []
    for network, parameters in ((model, found.values()), (peft, [expected[key] for key in found])):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            loss = network(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3] < losses[0]
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)


def test_a_router_is_adapted_where_it_is_named(load_random: Load, tmp_path: Path) -> None:
    model = load_random("mixtral")
    before = logits(model)
    attach_lora(model, AdapterConfig(rank=2, alpha=7, targets=["mlp.gate.weight", "down_proj"]))
    randomize(model)
    assert not torch.equal(logits(model), before)
    save_adapter(model, tmp_path, "base")
    assert_equal(logits(PeftModel.from_pretrained(load_random("mixtral"), tmp_path).eval()), logits(model))


def test_dora_trains_like_pefts(load_random: Load) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "wte"], use_dora=True)
    peft = get_peft_model(load_random("gpt2"), config)
    model = load_random("gpt2")
    attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=["c_attn", "wte"], type="dora"))
    randomize(model)
    own = dict(model.named_parameters())
    names = (("embedding_", ""), ("_vector", ""), (".default", ""), (".weight", ""))
    theirs = {}
    for key, parameter in peft.base_model.model.named_parameters():
        if "lora_" in key:
            for old, new in names:
                key = key.replace(old, new)
            theirs[key] = parameter
            parameter.data.copy_(own[key])
    for network in (model, peft):
        network(input_ids=IDS, labels=IDS).loss.backward()
    assert theirs.keys() == {key for key in own if "lora_" in key}
    for key, parameter in theirs.items():
        assert_equal(own[key].grad, parameter.grad)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_embedding_that_scales_its_rows_scales_the_adapters_too(
    variant: str, load_random: Load, tmp_path: Path
) -> None:
    model = load_random("gemma2")
    attach_lora(model, AdapterConfig(rank=3, alpha=7, targets=["embed_tokens"], **VARIANTS[variant]))
    randomize(model)
    save_adapter(model, tmp_path, "base")
    assert_equal(logits(PeftModel.from_pretrained(load_random("gemma2"), tmp_path).eval()), logits(model))
