"""Linear and MergedLinear beyond loralib."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lory.lora as lora


def test_from_base_shares_the_parameters_and_answers_alike() -> None:
    base, x = nn.Linear(6, 4).to(torch.bfloat16).eval(), torch.randn(3, 6, dtype=torch.bfloat16)
    layer = lora.Linear.from_base(base, r=2, lora_alpha=4)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not layer.training
    assert not layer.merge_weights
    assert layer.scaling == 2.0
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert not layer.weight.requires_grad
    assert torch.equal(layer(x), base(x))
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


def test_from_base_takes_a_dtype_and_no_bias() -> None:
    layer = lora.Linear.from_base(nn.Linear(6, 4, bias=False), 2, 4, 0.1, dtype=torch.float64)
    assert layer.lora_A.dtype == torch.float64
    assert layer.bias is None
    assert layer.lora_dropout == 0.1
    assert layer(torch.randn(3, 6)).dtype == torch.float32


def test_a_transposed_weight_is_contiguous_and_redrawn_as_it_should(tmp_path: Path) -> None:
    layer = lora.Linear(400, 4, r=2, fan_in_fan_out=True)
    assert layer.weight.shape == (400, 4)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert load_file(tmp_path / "layer.safetensors")["weight"].shape == (400, 4)
    layer.reset_parameters()
    assert layer.weight.shape == (400, 4)
    assert layer.weight.abs().max() <= 400**-0.5  # the bound for 400 inputs, not for 4


def test_dropout_works_on_the_adapter_in_training_only() -> None:
    layer, x = lora.Linear(50, 4, r=2, lora_dropout=0.5), torch.randn(3, 50)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base)  # B is zero
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_merged_linear_without_adapted_slices_is_a_plain_linear() -> None:
    layer, x = lora.MergedLinear(6, 4, r=2), torch.randn(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.weight.requires_grad


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_unequal_slices_are_linears_side_by_side(fan_in_fan_out: bool) -> None:
    sizes, enable = [8, 2, 3, 2], [True, True, False, True]
    layer = lora.MergedLinear(
        6, 15, r=2, lora_alpha=6, enable_lora=enable, out_slices=sizes, fan_in_fan_out=fan_in_fan_out
    ).double()
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.shape == (3 * 2, 6)
    assert layer.lora_B.shape == (8 + 2 + 2, 2)
    x = torch.randn(5, 6, dtype=torch.float64)
    weight = layer.weight.t() if fan_in_fan_out else layer.weight
    expected, row, index = [], 0, 0
    for start, size, enabled in zip([0, 8, 10, 13], sizes, enable, strict=True):
        y = x @ weight[start : start + size].t() + layer.bias[start : start + size]
        if enabled:
            y = y + 3.0 * x @ layer.lora_A[2 * index : 2 * index + 2].t() @ layer.lora_B[row : row + size].t()
            row, index = row + size, index + 1
        expected.append(y)
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=-1))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), torch.cat(expected, dim=-1))


@pytest.mark.parametrize(
    ("enable", "slices", "said"),
    [
        ([True, False, True], None, "3 entries, which don't divide out_features=16"),
        ([], None, "enable_lora is empty"),
        ([True, False], [8, 4, 4], "out_slices has 3"),
        ([True, False], [8, 4], "add up to out_features=16"),
        ([True, False], [17, -1], "add up to out_features=16"),
    ],
)
def test_slices_that_do_not_add_up_are_refused(enable: list[bool], slices: list[int] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lora.MergedLinear(8, 16, r=2, enable_lora=enable, out_slices=slices)
