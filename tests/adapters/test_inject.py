"""Which layers get an adapter, what the model is afterwards, and what a wrong target is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lory.lora as lora
from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora, list_linears, match_targets, replace_linear
from lory.config import build
from lory.runtime import UsageError

IDS = torch.tensor([[5, 17, 99, 3, 64]])
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def model(random_model: Callable[..., Any]) -> Any:
    return random_model("Llama")


def endings(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_all_linear_is_all_but_the_output_head(model: nn.Module) -> None:
    names = match_targets(model, "all-linear")
    assert len(names) == 2 * len(PROJECTIONS)
    assert endings(names) == set(PROJECTIONS)


def test_all_linear_of_a_plain_module_is_all(model: nn.Module) -> None:
    assert match_targets(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)), "all-linear") == ["0", "2"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["lm_head"], ["lm_head"]),
        (["layers.1.mlp.up_proj", "lm_head"], ["model.layers.1.mlp.up_proj", "lm_head"]),
        (r".*\.0\..*[qv]_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]),
        ("model.layers.1.self_attn.o_proj", ["model.layers.1.self_attn.o_proj"]),
        (["up_proj", "mlp.up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_names_and_expressions(model: nn.Module, targets: str | list[str], expected: list[str]) -> None:
    assert match_targets(model, targets) == expected


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("qproj", "names 'qproj', which no linear layer matches. Did you mean 'q_proj'?"),
        (["q_proj", "w1"], "names 'w1', which no linear layer matches. There are: q_proj (2)"),
        (r".*[xyz]_proj", "which no linear layer matches. There are:"),
        (r"q_proj|v_proj", "which no linear layer matches"),  # an expression matches whole paths
        (r".*(q_proj", "a broken regular expression: missing )"),
        ("mlp", "names 'mlp', which is not a linear layer of this model"),
        (["embed_tokens"], "names 'embed_tokens', which is not a linear layer of this model"),
        ([], "which no linear layer matches"),
    ],
)
def test_a_wrong_target_is_told_what_there_is(model: nn.Module, targets: str | list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as raised:
        match_targets(model, targets)
    assert sentence in str(raised.value)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_learns(model: Any) -> None:
    with torch.no_grad():
        before = model(IDS).logits
    keys = set(model.state_dict())
    matches = attach_lora(model, AdapterConfig(rank=3, alpha=7, dropout=0.5))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B"}
    assert sum(p.numel() for p in trainable.values()) == sum(match.parameters for match in matches)
    assert keys < set(model.state_dict())  # the base's own keys are as they were
    for (name, layer), match in zip(adapted_layers(model), matches, strict=True):
        assert (name, layer.in_features, layer.out_features) == (match.name, match.in_features, match.out_features)
        assert (layer.r, layer.scaling, layer.lora_dropout) == (3, 7 / 3, 0.5)
        assert match.parameters == 3 * (layer.in_features + layer.out_features)


def test_the_base_weight_is_shared_not_copied(model: Any) -> None:
    before = {name: module.weight.data_ptr() for name, module in list_linears(model).items()}
    attach_lora(model, AdapterConfig(rank=2))
    assert all(layer.weight.data_ptr() == before[name] for name, layer in adapted_layers(model))


def test_adapted_output_is_the_formula(model: Any) -> None:
    attach_lora(model, AdapterConfig(rank=3, alpha=6, targets=["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 24)
    expected = x @ layer.weight.T + 2.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_in_training_only(model: Any) -> None:
    attach_lora(model, AdapterConfig(rank=3, dropout=0.5))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_adapters_on_bf16_learn_in_fp32(model: Any) -> None:
    attach_lora(model.bfloat16(), AdapterConfig(rank=2))
    for _, layer in adapted_layers(model):
        assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (
            torch.bfloat16,
            torch.float32,
            torch.float32,
        )
    assert model(IDS).logits.dtype == torch.bfloat16


def test_a_layer_is_not_adapted_twice(model: Any) -> None:
    replace_linear(model, "lm_head", 2, 4)
    with pytest.raises(UsageError, match="'lm_head' carries an adapter already"):
        replace_linear(model, "lm_head", 2, 4)
    with pytest.raises(UsageError, match=r"to be a linear layer, but it is a Embedding"):
        replace_linear(model, "model.embed_tokens", 2, 4)
    assert isinstance(model.lm_head, lora.Linear)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "'rank' was given 0"),
        ({"alpha": 0}, "'alpha' was given 0"),
        ({"alpha": math.nan}, "'alpha' was given nan"),
        ({"dropout": 1.0}, "'dropout' was given 1.0"),
        ({"type": "dora"}, "'type' was given 'dora'"),
        ({"r": 3}, "unknown key 'r'"),
    ],
)
def test_settings_that_cannot_be_meant(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build(AdapterConfig, values, "adapter")
