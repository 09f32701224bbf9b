"""Convolutions beyond loralib: every kernel, every argument, dropout, and storage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from torch.nn import functional as F

import lory.lora as lora

KERNELS: list[tuple[Any, Any]] = [
    (lora.Conv1d, 3),
    (lora.Conv1d, (5,)),
    (lora.Conv2d, 3),
    (lora.Conv2d, (3, 2)),
    (lora.Conv2d, (1, 4)),
    (lora.Conv3d, 2),
    (lora.Conv3d, (1, 2, 3)),
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"groups": 2, "stride": 2, "bias": False},
    {"padding": 1, "padding_mode": "reflect", "dilation": 2},
    {"padding": "same", "padding_mode": "circular"},
]


def _make(make: Any, kernel: Any, r: int = 2, **extra: Any) -> tuple[Any, torch.Tensor]:
    layer = make(4, 6, kernel, r=r, lora_alpha=3, **extra)
    if r:
        nn.init.normal_(layer.lora_B)
    return layer, torch.randn(2, 4, *[9] * (layer.weight.dim() - 2))


@pytest.mark.parametrize(("make", "kernel"), KERNELS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_output_is_that_of_the_changed_weight(make: Any, kernel: Any, extra: dict[str, Any]) -> None:
    layer, x = _make(make, kernel, **extra)
    plain = type(layer.conv)(4, 6, kernel, **extra)
    delta = (layer.lora_B @ layer.lora_A).reshape(layer.weight.shape) * 1.5
    plain.load_state_dict({"weight": layer.weight + delta, **({"bias": layer.bias} if layer.bias is not None else {})})
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain(x))


@pytest.mark.parametrize(("make", "kernel"), KERNELS)
def test_without_an_adapter_any_kernel_works(make: Any, kernel: Any) -> None:
    layer, x = _make(make, kernel, r=0)
    assert torch.equal(layer(x), layer.conv(x))
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize(
    ("make", "kernel", "shape_A", "shape_B"),
    [
        (lora.Conv1d, 5, (2, 4 * 5), (3, 2)),
        (lora.Conv2d, 3, (2 * 3, 4 * 3), (3 * 3, 2 * 3)),
        (lora.Conv2d, (3, 2), (2 * 2, 4 * 2), (3 * 3, 2 * 2)),
        (lora.Conv3d, (2, 3, 4), (2 * 4, 4 * 4), (3 * 6, 2 * 4)),
    ],
)
def test_shapes_follow_the_kernel(make: Any, kernel: Any, shape_A: Any, shape_B: Any) -> None:
    layer, _ = _make(make, kernel, groups=2)
    assert (layer.lora_A.shape, layer.lora_B.shape) == (shape_A, shape_B)


def test_dropout_works_on_the_adapters_input() -> None:
    layer, x = _make(lora.Conv2d, 3, lora_dropout=0.5, padding=1)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    expected = layer.conv(x) + F.conv2d(F.dropout(x, 0.5), layer.delta_weight(), padding=1)
    torch.testing.assert_close(y, expected)
    assert not torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), layer(x))


def test_the_mean_over_dropout_is_the_output_without_it() -> None:
    layer, x = _make(lora.Conv1d, 3, lora_dropout=0.3)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
        spread = (mean - layer.eval()(x)).abs().mean() / (layer(x) - layer.conv(x)).abs().mean()
    assert spread < 0.05


def test_each_parameter_is_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(_make(lora.Conv2d, 3)[0], nn.ReLU())
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    save_model(model, str(tmp_path / "b.safetensors"))
    other = nn.Sequential(_make(lora.Conv2d, 3)[0], nn.ReLU())
    load_model(other, str(tmp_path / "b.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("names", list(itertools.product(["weight", "conv.weight"], ["bias", "conv.bias"])))
def test_weights_load_under_both_names(names: tuple[str, str]) -> None:
    model, base = nn.Sequential(lora.Conv2d(4, 6, 3, r=2)), nn.Conv2d(4, 6, 3)
    values = dict(zip(names, (base.weight, base.bias), strict=True))
    result = model.load_state_dict({f"0.{name}": value for name, value in values.items()}, strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == ["0.lora_A", "0.lora_B"]
    assert torch.equal(model[0].weight, base.weight)
    assert torch.equal(model[0].bias, base.bias)


def test_a_state_dict_with_each_name_twice_loads() -> None:
    layer, other = _make(lora.Conv2d, 3)[0], lora.Conv2d(4, 6, 3, r=2)
    state = {**layer.state_dict(), "weight": layer.weight, "bias": layer.bias}
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in other.state_dict().items())
