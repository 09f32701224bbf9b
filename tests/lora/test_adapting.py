"""A model's own layers become LoRA layers: shared weights, their own keys, and the variants DoRA, rsLoRA and PiSSA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lory.lora as lora
from lory.lora.layer import LoRALayer


def adapt(base: nn.Module, r: int = 2, alpha: float = 3, dropout: float = 0.0, **options: Any) -> LoRALayer:
    if isinstance(base, nn.Embedding):
        return lora.Embedding.from_base(base, r, alpha, **options)
    if isinstance(base, nn.Linear | Conv1D):
        return lora.Linear.from_base(base, r, alpha, dropout, fan_in_fan_out=isinstance(base, Conv1D), **options)
    return lora.adapt_convolution(base, r, alpha, dropout, **options)


def indices() -> Tensor:
    return torch.tensor([[0, 3, 6], [2, 2, 5]])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(6)),
    "transformers' Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=1), indices),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 3), padding=1, dilation=2), lambda: torch.randn(2, 3, 7, 8)),
    "conv2d of one picture": (
        lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"),
        lambda: torch.randn(3, 7, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), bias=False), lambda: torch.randn(2, 2, 4, 4, 5)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, draw = CASES[request.param]
    return make(), draw()


def randomize(layer: LoRALayer) -> None:
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        if layer.has_magnitude:
            layer.lora_magnitude.mul_(1 + torch.rand_like(layer.lora_magnitude))


def with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    changed = copy.deepcopy(base)
    changed.weight = nn.Parameter(weight)
    return changed


def test_a_fresh_layer_shares_everything_and_answers_alike(case: tuple[nn.Module, Tensor]) -> None:
    base, x = case
    layer = adapt(base)
    assert layer.weight is base.weight
    assert set(layer.state_dict()) == {*base.state_dict(), "lora_A", "lora_B"}
    assert set(base.state_dict()) == set(adapt(base, r=0).state_dict())
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.eval()(x), base(x))


@pytest.mark.parametrize("dora", [False, True])
def test_the_output_is_that_of_the_merged_weight(case: tuple[nn.Module, Tensor], dora: bool) -> None:
    base, x = case
    layer = adapt(base)
    if dora:
        layer.add_magnitude()
        torch.testing.assert_close(layer(x), base(x))
    randomize(layer)
    before = base.weight.clone()
    for mode in (True, False):
        layer.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(layer(x), with_weight(base, layer.merged_weight())(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_works_on_the_adapters_input_only(case: tuple[nn.Module, Tensor], dora: bool) -> None:
    base, x = case
    if isinstance(base, nn.Embedding):
        pytest.skip("an embedding has no input to drop")
    layer = adapt(base, dropout=0.5)
    if dora:
        layer.add_magnitude()
    assert torch.allclose(layer.train()(x), base(x), atol=1e-5)
    randomize(layer)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    plain, x_dropped = base.weight, F.dropout(x, 0.5)
    zero = torch.zeros_like(base(x)) if base.bias is None else with_weight(base, torch.zeros_like(plain))(x)
    change = with_weight(base, layer.delta_weight())(x_dropped) - zero
    raw = base(x) - zero + change
    axis = raw.dim() - 1 if isinstance(base, nn.Linear | Conv1D) else raw.dim() - (plain.dim() - 2) - 1
    scale = layer.magnitude_scale() if dora else torch.ones(raw.shape[axis])
    shape = [-1 if i == axis else 1 for i in range(raw.dim())]
    torch.testing.assert_close(found, raw * scale.view(shape) + zero, rtol=1e-4, atol=1e-4)


def test_doras_rows_have_the_learnt_lengths(case: tuple[nn.Module, Tensor]) -> None:
    layer = adapt(case[0])
    layer.add_magnitude()
    randomize(layer)
    weight = layer.merged_weight().movedim(layer.output_axis, 0).flatten(1)
    torch.testing.assert_close(weight.norm(dim=1), layer.lora_magnitude)


def test_doras_norm_is_a_constant_to_the_gradient(case: tuple[nn.Module, Tensor]) -> None:
    base, x = case
    layer = adapt(base)
    layer.add_magnitude()
    randomize(layer)
    layer(x).square().sum().backward()
    found = layer.lora_B.grad
    scale = layer.magnitude_scale().detach()
    shape = [-1 if i == layer.output_axis else 1 for i in range(base.weight.dim())]
    lora_B = layer.lora_B.detach().requires_grad_()
    layer._parameters["lora_B"] = lora_B
    weight = (base.weight.detach() + layer.delta_weight()) * scale.view(shape)
    torch.func.functional_call(base, {"weight": weight}, (x,)).square().sum().backward()
    torch.testing.assert_close(found, lora_B.grad, rtol=1e-3, atol=1e-3)


def test_a_held_scale_follows_what_it_depends_on() -> None:
    layer = adapt(nn.Linear(6, 5)).eval()
    layer.add_magnitude()
    x = torch.randn(3, 6)
    with torch.no_grad():
        for parameter in (layer.lora_B, layer.lora_magnitude, layer.lora_A, layer.weight):
            layer(x)
            parameter.normal_()
            torch.testing.assert_close(layer(x), F.linear(x, layer.merged_weight(), layer.bias))


def test_rslora_scales_by_the_root_of_the_rank(case: tuple[nn.Module, Tensor]) -> None:
    assert adapt(case[0], r=4, alpha=6).scaling == 6 / 4
    assert adapt(case[0], r=4, alpha=6, rslora=True).scaling == 6 / math.sqrt(4)


def test_a_half_precision_base_gets_an_fp32_adapter(case: tuple[nn.Module, Tensor]) -> None:
    base, x = case
    layer = adapt(base.to(torch.bfloat16))
    layer.add_magnitude()
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.lora_magnitude.dtype} == {torch.float32}
    y = layer(x if isinstance(base, nn.Embedding) else x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_hooks_and_settings_come_along() -> None:
    base = nn.Linear(6, 5)
    base.own = "kept"
    base.register_forward_hook(lambda module, arguments, y: y + 1)
    layer = adapt(base)
    x = torch.randn(6)
    assert layer.own == "kept"
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_pissa_starts_with_the_best_low_rank_part_of_the_weight(fan_in_fan_out: bool) -> None:
    base = Conv1D(5, 6) if fan_in_fan_out else nn.Linear(6, 5)
    nn.init.normal_(base.weight)
    layer = lora.Linear.from_base(base, 2, 3, fan_in_fan_out=fan_in_fan_out)
    layer.start_principal()
    part = layer.scaling * layer.lora_B @ layer.lora_A
    weight = base.weight.t() if fan_in_fan_out else base.weight
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(weight - part)[:3], values[2:])
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), base(x))


def test_a_convolution_in_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="2 groups"):
        lora.adapt_convolution(nn.Conv1d(4, 4, 3, groups=2), 2, 2)


class Experts(nn.Module):
    """Stacked linear layers, used one at a time, as transformers' experts are."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5) if transposed else torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(3, 5, 4) if transposed else torch.randn(3, 4, 5))
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.up, self.down]
        for index in range(3):
            for weight in weights:
                one = weight[index]
                x = x @ (one if self.transposed else one.t())
        return x


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_weights_get_one_adapter_each(transposed: bool) -> None:
    torch.manual_seed(0)
    module, x = Experts(transposed), torch.randn(2, 4)
    before = module(x)
    layers = [lora.adapt_parameter(module, name, 2, 3, transposed=transposed) for name in ("up", "down")]
    assert torch.equal(module(x), before)
    for layer in layers:
        layer.lora_B.data.normal_()
    expected = Experts(transposed)
    expected.up.data = module.up + layers[0].delta_weight()
    expected.down.data = module.down + layers[1].delta_weight()
    torch.testing.assert_close(module(x), expected(x))
    torch.testing.assert_close(copy.deepcopy(module)(x), expected(x))
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"lora_{name}.lora_{part}" for name in ("up", "down") for part in "AB"
    }


def test_a_parameter_reads_unchanged_outside_of_the_forward() -> None:
    module = Experts(False)
    weight = module.up
    lora.adapt_parameter(module, "up", 2, 3).lora_B.data.normal_()
    module(torch.randn(2, 4))
    assert module.up is weight
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 9))
    assert module.up is weight
