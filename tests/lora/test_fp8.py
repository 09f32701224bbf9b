"""FP8 layers: forward and gradient are those of the rounded numbers, and the adapter is untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lory.lora as lora
from lory.lora.fp8 import DTYPE, LARGEST, LinearFp8, Rounded, multiply, multiply_back, round_rows

IN, OUT = 48, 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose rows differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0 ** torch.linspace(-3, 3, shape[0])
    return torch.randn(*shape, generator=generator) * rows.view(-1, *[1] * (len(shape) - 1))


def make(adapter: bool = True, bias: bool = True, seed: int = 0, **settings: Any) -> tuple[Any, LinearFp8]:
    """A layer and the same in FP8."""
    torch.manual_seed(seed)
    base: Any = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    if adapter:
        base = lora.Linear.from_base(base, 3, 5, **settings)
        nn.init.normal_(base.lora_B, std=0.2)
    return base, LinearFp8.from_layer(copy.deepcopy(base))


def test_rounding_keeps_every_row_to_a_sixteenth_of_its_digits() -> None:
    x = draw(7, 40)
    rounded = round_rows(x)
    assert rounded.values.dtype == DTYPE
    assert rounded.values.float().abs().amax(-1).tolist() == [LARGEST] * 7
    # three bits behind the leading one, and an absolute floor at FP8's smallest step
    limit = x.abs() / 16 + rounded.scale * 2.0**-10
    assert ((rounded.numbers() - x).abs() <= limit).all()


def test_a_row_of_zeros_and_the_smallest_numbers_stay_finite() -> None:
    x = torch.zeros(2, 16)
    x[1] = torch.finfo(torch.float32).tiny
    assert torch.equal(round_rows(x).numbers()[0], x[0])
    assert round_rows(x).numbers().isfinite().all()


def test_products_are_those_of_the_rounded_numbers() -> None:
    x, weight = round_rows(draw(5, IN)), round_rows(draw(OUT, IN, seed=1))
    exact = x.numbers().double() @ weight.numbers().double().T
    torch.testing.assert_close(multiply(x, weight, torch.float32).double(), exact, rtol=1e-5, atol=1e-4)
    half = multiply(x, weight, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=8e-3, atol=1.0)


def test_the_input_gradient_sees_the_same_weight_and_a_rounded_gradient() -> None:
    grad, weight = draw(5, OUT), round_rows(draw(OUT, IN, seed=1))
    found = multiply_back(grad, weight)
    rounded = round_rows(grad * weight.scale.T).numbers()
    torch.testing.assert_close(found, rounded @ weight.values.float(), rtol=1e-5, atol=1e-4)
    exact = grad @ weight.numbers()
    assert ((found - exact).norm(dim=-1) < 0.04 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_layer_is_close_to_its_original_and_at_its_dequantized_weight(adapter: bool, bias: bool) -> None:
    base, layer = make(adapter, bias)
    x = torch.randn(2, 7, IN)
    assert (layer(x) - base(x)).norm() < 0.05 * base(x).norm()
    # with an input that FP8 holds exactly only the weight's rounding is left
    exact = torch.randint(-8, 9, (2, 7, IN)).float()
    exact[..., 0] = LARGEST
    base.weight = nn.Parameter(layer.base_weight(), requires_grad=False)
    torch.testing.assert_close(layer(exact), base(exact), rtol=1e-5, atol=1e-3)


def test_gradients_are_those_over_the_dequantized_weight_but_for_the_rounding() -> None:
    base, layer = make()
    base.weight = nn.Parameter(layer.base_weight(), requires_grad=False)
    x = torch.randn(2, 7, IN)
    weight = torch.randn(2, 7, OUT)
    results = []
    for module in (layer, base):
        given = x.clone().requires_grad_()
        results.append(torch.autograd.grad((module(given) * weight).sum(), [given, module.lora_A, module.lora_B]))
    (grad_x, *adapter), (expected_x, *expected) = results
    assert (grad_x - expected_x).norm() < 0.04 * expected_x.norm()
    # the adapter's own gradients meet nothing that is rounded
    for ours, theirs in zip(adapter, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("change", [lambda layer: layer.add_magnitude(), lambda layer: layer.start_principal()])
def test_other_adapters_keep_what_they_are(change: Any) -> None:
    torch.manual_seed(0)
    base = lora.Linear.from_base(nn.Linear(IN, OUT), 3, 5)
    change(base)
    layer = LinearFp8.from_layer(base)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(4, IN)
    assert layer.lora_A is base.lora_A
    assert (layer(x) - base(x)).norm() < 0.05 * base(x).norm()


def test_half_precision_inputs_give_half_precision_outputs() -> None:
    base = lora.Linear.from_base(nn.Linear(IN, OUT, dtype=torch.bfloat16), 3, 5)
    layer = LinearFp8.from_layer(base)
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.dtype == torch.float32


def test_weights_take_a_byte_each_and_the_state_has_their_scales() -> None:
    _, layer = make()
    assert layer.weight.element_size() == 1
    state = layer.state_dict()
    assert set(state) == {"weight", "weight_scale", "bias", "lora_A", "lora_B"}
    assert torch.equal(Rounded(state["weight"], state["weight_scale"]).numbers(), layer.base_weight())


def test_what_it_cannot_be_is_refused() -> None:
    _, layer = make()
    with pytest.raises(TypeError, match="merged into the 16- or 32-bit weight"):
        layer.merged_weight()
    with pytest.raises(TypeError, match="use from_layer"):
        LinearFp8(16, 16)
    with pytest.raises(ValueError, match="only a frozen one"):
        LinearFp8.from_layer(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"\(16, 24\)"):
        LinearFp8.from_layer(nn.Linear(24, 16).requires_grad_(False))
