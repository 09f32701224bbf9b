"""Which parameters are trained and stored."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import lory.lora as lora


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapted = lora.Linear(4, 4, r=2)
        self.conv = lora.Conv1d(4, 4, 3, r=2)
        self.unbiased = lora.Linear(4, 4, r=2, bias=False)
        self.rank_zero = lora.Linear(4, 4)
        self.flora_x = nn.Linear(4, 4)
        self.lora_free = nn.Linear(4, 4)
        self.debias = nn.Linear(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 1)
        self.recurrent = nn.LSTM(4, 4)


LORA = {f"{layer}.lora_{part}" for layer in ("adapted", "conv", "unbiased") for part in "AB"}
OWN_BIASES = {"adapted.bias", "conv.conv.bias"}
OTHER_BIASES = {
    "rank_zero.bias",
    "flora_x.bias",
    "lora_free.bias",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "recurrent.bias_ih_l0",
    "recurrent.bias_hh_l0",
}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", LORA), ("lora_only", LORA | OWN_BIASES), ("all", LORA | OWN_BIASES | OTHER_BIASES)],
)
def test_what_is_trained_is_what_is_stored(bias: Any, expected: set[str]) -> None:
    model = Model()
    lora.mark_only_lora_as_trainable(model, bias=bias)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert set(lora.lora_state_dict(model, bias=bias)) == expected


def test_an_adapted_layer_as_the_whole_model() -> None:
    layer = lora.Linear(4, 4, r=2)
    lora.mark_only_lora_as_trainable(layer, bias="lora_only")
    assert list(lora.lora_state_dict(layer, bias="lora_only")) == ["bias", "lora_A", "lora_B"]
    assert layer.bias.requires_grad


def test_a_shared_bias_is_stored_under_each_name() -> None:
    model = nn.ModuleList([lora.Linear(4, 4, r=2), lora.Linear(4, 4, r=2)])
    model[1].bias = model[0].bias
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    assert model[0].bias.requires_grad
    assert {"0.bias", "1.bias"} <= set(lora.lora_state_dict(model, bias="lora_only"))


def test_an_unknown_bias_is_refused_before_anything_is_frozen() -> None:
    model = Model()
    wrong: Any = "lora"
    with pytest.raises(ValueError, match="none, all, lora_only"):
        lora.mark_only_lora_as_trainable(model, bias=wrong)
    assert model.flora_x.weight.requires_grad
    with pytest.raises(ValueError, match="bias='lora'"):
        lora.lora_state_dict(model, bias=wrong)
