"""What holds for every adapted layer: the stored weight is never merged, and layers copy, move and chain."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lory.lora as lora

_GENERATOR = torch.Generator().manual_seed(1)

CASES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "linear": (lambda **k: lora.Linear(6, 4, r=2, lora_dropout=0.2, **k), torch.randn(3, 6, generator=_GENERATOR)),
    "transposed": (
        lambda **k: lora.Linear(6, 4, r=2, fan_in_fan_out=True, **k),
        torch.randn(3, 6, generator=_GENERATOR),
    ),
    "merged": (
        lambda **k: lora.MergedLinear(6, 4, r=2, enable_lora=[True, False], **k),
        torch.randn(3, 6, generator=_GENERATOR),
    ),
    "embedding": (lambda **k: lora.Embedding(9, 4, r=2, **k), torch.tensor([[0, 3, 3], [8, 1, 2]])),
    "conv1d": (lambda **k: lora.Conv1d(3, 4, 3, r=2, **k), torch.randn(2, 3, 7, generator=_GENERATOR)),
    "conv2d": (lambda **k: lora.Conv2d(3, 4, (3, 2), r=2, **k), torch.randn(2, 3, 7, 5, generator=_GENERATOR)),
    "conv3d": (lambda **k: lora.Conv3d(3, 4, 2, r=2, **k), torch.randn(2, 3, 4, 5, 3, generator=_GENERATOR)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Tensor]:
    return CASES[request.param]


def _make(make: Callable[..., Any], **arguments: Any) -> Any:
    """A layer whose adapter changes something."""
    torch.manual_seed(0)
    layer = make(**arguments)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


@torch.no_grad()
def _run(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


def _unmerged(layer: Any, x: Tensor) -> Tensor:
    """The layer's output without dropout from its own parameters now, no merged weight used."""
    fresh = copy.deepcopy(layer).eval()
    fresh.merge_weights = False
    return _run(fresh, x)


def test_train_and_eval_return_the_layer(case: Any) -> None:
    layer = _make(case[0])
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training


def test_eval_stores_the_unmerged_weight(case: Any) -> None:
    make, x = case
    layer = _make(make)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    _run(layer.eval(), x)
    assert layer.merged
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_state_dict_saved_in_eval_gives_the_same_answers(case: Any) -> None:
    make, x = case
    layer, other = _make(make).eval(), make().eval()
    expected = _run(layer, x)
    _run(other, x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(_run(other, x), expected)
    again = make()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(_run(again.eval(), x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_switches_change_no_bit(case: Any, dtype: torch.dtype) -> None:
    make, x = case
    layer = _make(make).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    weight, expected = layer.weight.clone(), _run(layer.eval(), x)
    for _ in range(1000):
        layer.train().eval()
    assert torch.equal(_run(layer, x), expected)
    for _ in range(10):
        layer.train()
        _run(layer.eval(), x)
    assert torch.equal(layer.weight, weight)


def test_eval_really_merges_and_only_when_asked(case: Any) -> None:
    make, x = case
    layer = _make(make).eval()
    torch.testing.assert_close(_run(layer, x), _unmerged(layer, x), rtol=1e-5, atol=1e-5)
    assert layer._held_weight() is None  # gradients are wanted
    with torch.no_grad():
        held = layer._held_weight()
        assert held is layer._held_weight()
        assert torch.equal(held, layer.merged_weight())
        assert _make(make, merge_weights=False).eval()._held_weight() is None
        assert layer.train()._held_weight() is None


def _change_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A.add_(1.0)


def _step(layer: Any) -> None:
    layer.lora_B.grad = torch.ones_like(layer.lora_B)
    torch.optim.SGD([layer.lora_B], lr=0.5).step()


def _load(layer: Any) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def _assign(layer: Any) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def _swap_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 2


def _edit_data_and_say_so(layer: Any) -> None:
    layer.lora_A.data.mul_(3.0)
    layer.eval()


def _replace(layer: Any) -> None:
    layer.lora_A = nn.Parameter(layer.lora_A.detach() * 2)


@pytest.mark.parametrize(
    "change", [_change_in_place, _step, _load, _assign, _swap_data, _edit_data_and_say_so, _replace]
)
def test_whatever_changes_a_parameter_changes_the_answer(case: Any, change: Callable[[Any], None]) -> None:
    make, x = case
    layer = _make(make).eval()
    before = _run(layer, x)
    change(layer)
    after = _run(layer, x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, _unmerged(layer, x), rtol=1e-4, atol=1e-4)


def test_moves_and_casts_take_everything_along(case: Any) -> None:
    make, x = case
    layer = _make(make).eval()
    expected = _run(layer, x)
    layer.to(torch.float64)
    wide = x.double() if x.is_floating_point() else x
    assert _run(layer, wide).dtype == torch.float64
    torch.testing.assert_close(_run(layer, wide).float(), expected, rtol=1e-4, atol=1e-5)
    layer.to("meta")
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert _run(layer, wide.to("meta")).device.type == "meta"
    assert _run(layer.train(), wide.to("meta")).device.type == "meta"


@pytest.mark.parametrize("copy_layer", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301
def test_layers_can_be_copied_and_pickled(case: Any, copy_layer: Callable[[Any], Any]) -> None:
    make, x = case
    layer = _make(make).eval()
    expected = _run(layer, x)
    other = copy_layer(layer)
    assert torch.equal(_run(other, x), expected)
    _change_in_place(other)
    assert torch.equal(_run(layer, x), expected)
    assert not torch.allclose(_run(other, x), expected)


def test_a_pickle_does_not_hold_the_merged_weight() -> None:
    layer = lora.Linear(64, 64, r=1).eval()
    before = len(pickle.dumps(layer))
    _run(layer, torch.randn(1, 64))
    assert len(pickle.dumps(layer)) == before


def test_adapters_get_gradients_in_eval_mode_too(case: Any) -> None:
    make, x = case
    layer = _make(make).eval()
    _run(layer, x)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.lora_B.grad.abs().sum() > 0
    assert layer.weight.grad is None


def test_inference_mode_does_not_spoil_later_gradients() -> None:
    layer, x = _make(CASES["linear"][0]).eval().requires_grad_(False), torch.randn(3, 6, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, layer.merged_weight().sum(0).expand(3, 6))


def test_a_layer_born_in_inference_mode_answers_from_its_present_parameters() -> None:
    with torch.inference_mode():
        layer, x = _make(CASES["linear"][0]).eval(), torch.randn(3, 6)
        before = layer(x)
        layer.lora_A.add_(1.0)
        assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_half_precision_bases_take_fp32_adapters(case: Any, base: torch.dtype) -> None:
    make, x = case
    layer = _make(make)
    expected = _run(layer.eval(), x)
    layer.weight.data = layer.weight.data.to(base)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = layer.bias.data.to(base)
    x = x.to(base) if x.is_floating_point() else x
    for training in (True, False):
        layer.train(training)
        y = layer(x)
        assert y.dtype == base
        y.float().sum().backward()
        assert layer.lora_A.grad.dtype == torch.float32
    merged = _run(layer, x)
    assert merged.dtype == base
    assert (merged.float() - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"r": -1}, "r=-1"),
        ({"r": 2, "lora_alpha": 0}, "lora_alpha=0"),
        ({"r": 2, "lora_alpha": float("nan")}, "lora_alpha=nan"),
    ],
)
@pytest.mark.parametrize(
    "make", [lora.Linear, lora.MergedLinear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d]
)
def test_settings_out_of_range_are_refused(make: Any, arguments: dict[str, Any], said: str) -> None:
    sizes = (4, 4, 3) if make.__name__.startswith("Conv") else (4, 4)
    with pytest.raises(ValueError, match=said):
        make(*sizes, **arguments)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("make", [lora.Linear, lora.MergedLinear, lora.Conv1d, lora.Conv2d, lora.Conv3d])
def test_a_dropout_that_is_no_probability_is_refused(make: Any, dropout: float) -> None:
    sizes = (4, 4, 3) if make.__name__.startswith("Conv") else (4, 4)
    with pytest.raises(ValueError, match=f"lora_dropout={dropout}"):
        make(*sizes, r=2, lora_dropout=dropout)


def test_rank_zero_is_the_plain_layer() -> None:
    layer, x = lora.Linear(6, 4), torch.randn(3, 6)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight.requires_grad
    assert not layer.has_adapter
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))
