from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lory.lora as lora

bnb = pytest.importorskip("bitsandbytes")

KINDS = ["nf4", "int8"]
IN, OUT = 96, 64  # multiples of 32, since only such layers are repacked in eval mode


def quantize(kind: str, bias: bool = True) -> Any:
    """A quantized layer of bitsandbytes with random weights, in train mode."""
    plain = nn.Linear(IN, OUT, bias=bias)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type="nf4", compress_statistics=True)
        layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    else:
        layer = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    if bias:
        layer.bias = plain.bias
    return layer.to("cpu")


def randomise(layer: Any) -> Any:
    with torch.no_grad():
        layer.lora_A.normal_(std=0.2)
        layer.lora_B.normal_(std=0.2)
    return layer


def on_numbers(layer: Any) -> lora.Linear:
    """The same LoRA over a plain layer that holds the dequantized weight."""
    plain = nn.Linear(IN, OUT, bias=layer.bias is not None)
    plain.weight = nn.Parameter(layer.base_weight().float(), requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    same = lora.Linear.from_base(plain, layer.r, layer.lora_alpha, layer.lora_dropout, rslora=layer.rslora)
    if layer.has_magnitude:
        same.add_magnitude()
        same.lora_magnitude = nn.Parameter(layer.lora_magnitude.detach().clone())
    with torch.no_grad():
        same.lora_A.copy_(layer.lora_A)
        same.lora_B.copy_(layer.lora_B)
    return same


def gradients(layer: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(5)
    y = layer(x)
    (y * torch.linspace(-1, 1, OUT)).square().sum().backward()
    learnt = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **learnt}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        error = float((value - other[name]).norm() / other[name].norm())
        assert error < tolerance, f"{name}: {error}"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, IN)


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda layer: None,
    "an evaluation": lambda layer: layer.eval()(torch.randn(3, IN)),
    "an evaluation without gradients": lambda layer: torch.no_grad()(layer.eval())(torch.randn(3, IN)),
    "an evaluation of the shared base": lambda layer: layer.shared_base[0].eval()(torch.randn(3, IN)),
    "a move": lambda layer: layer.to("cpu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_outputs_and_gradients_are_those_over_the_dequantized_weight(kind: str, change: str, x: Tensor) -> None:
    base = quantize(kind)
    layer = randomise(lora.adapt_quantized(base, r=4, lora_alpha=8))
    layer.shared_base = [base]
    expected = gradients(on_numbers(layer), x)
    CHANGES[change](layer)
    assert_same(gradients(layer.train(), x), expected)
    assert {"lora_A", "lora_B", "bias"} < gradients(layer, x).keys()


def test_train_and_eval_mode_compute_the_same(kind: str, x: Tensor) -> None:
    layer = randomise(lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8))
    trained = layer.train()(x)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("settings", [{"rslora": True}, {"lora_dropout": 0.4}])
def test_rslora_and_dropout_work_as_on_plain_layers(kind: str, settings: dict[str, Any], x: Tensor) -> None:
    layer = randomise(lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8, **settings))
    assert_same(gradients(layer, x), gradients(on_numbers(layer), x))


def test_dora_works_as_on_plain_layers(kind: str, x: Tensor) -> None:
    layer = lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8)
    before = layer(x)
    layer.add_magnitude()
    torch.testing.assert_close(layer(x), before)
    randomise(layer)
    with torch.no_grad():
        layer.lora_magnitude.mul_(1.3)
    assert_same(gradients(layer, x), gradients(on_numbers(layer), x))


def test_pissa_starts_from_the_dequantized_weight_and_changes_nothing_yet(kind: str, x: Tensor) -> None:
    layer = lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8)
    before = layer(x)
    layer.start_principal()
    assert layer.lora_B.abs().max() > 0
    torch.testing.assert_close(layer(x), before)


def test_a_fresh_adapter_answers_like_its_base_and_is_fp32(kind: str, x: Tensor) -> None:
    base = quantize(kind)
    lora.make_steady(base)
    layer = lora.adapt_quantized(base, r=4, lora_alpha=8)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_half_precision_outputs(kind: str, dtype: torch.dtype, x: Tensor) -> None:
    layer = randomise(lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8))
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    expected = on_numbers(layer)(x).detach()
    assert float((y.detach().float() - expected).norm() / expected.norm()) < 2e-2


def test_weight_state_and_keys_are_the_bases(kind: str) -> None:
    base = quantize(kind)
    layer = lora.adapt_quantized(base, r=4, lora_alpha=8)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert set(layer.state_dict()) - set(base.state_dict()) == {"lora_A", "lora_B"}
    for name, value in base.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    assert "lora_A" not in base.state_dict()


def test_the_layers_are_both_linear_adapters_and_bitsandbytes_layers(kind: str) -> None:
    layer = lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8)
    assert isinstance(layer, lora.Linear)
    assert isinstance(layer, {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[kind])
    assert type(layer) is {"nf4": lora.Linear4bit, "int8": lora.Linear8bit}[kind]
    assert lora.is_quantized(layer)
    assert lora.is_quantized(quantize(kind))
    assert not lora.is_quantized(nn.Linear(2, 2))
    assert not lora.is_quantized(nn.Embedding(2, 2))


def test_nothing_is_merged(kind: str, x: Tensor) -> None:
    layer = randomise(lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8))
    stored = layer.weight.data.clone()
    layer.eval()(x)
    assert not layer.merged
    assert torch.equal(layer.weight.data, stored)
    with pytest.raises(TypeError, match="16- or 32-bit weight"):
        layer.merged_weight()
    torch.testing.assert_close(layer.delta_weight(), 2.0 * layer.lora_B @ layer.lora_A)


def test_rank_0_is_the_base_alone(kind: str, x: Tensor) -> None:
    base = quantize(kind)
    layer = lora.adapt_quantized(base, r=0, lora_alpha=1)
    assert not layer.has_adapter
    torch.testing.assert_close(layer(x), base(x))


def test_only_the_adapter_is_trained_and_drawn_anew(kind: str) -> None:
    layer = randomise(lora.adapt_quantized(quantize(kind, bias=False), r=4, lora_alpha=8))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    stored = layer.weight.data.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight.data, stored)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301
def test_copies_compute_the_same_and_share_nothing(kind: str, duplicate: Callable[[Any], Any], x: Tensor) -> None:
    layer = randomise(lora.adapt_quantized(quantize(kind), r=4, lora_alpha=8))
    layer(x)
    other = duplicate(layer)
    assert_same(gradients(other, x), gradients(layer, x))
    assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_the_backward_pass_keeps_no_input_of_the_quantized_product(kind: str) -> None:
    layer = lora.adapt_quantized(quantize(kind, bias=False), r=0, lora_alpha=1)
    x = torch.randn(3, IN, requires_grad=True)
    inner = x * 2
    gone = weakref.ref(inner)
    y = layer(inner)
    del inner
    assert gone() is None
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer.base_weight().float().sum(0).expand(3, IN))


def test_layers_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear was given; bitsandbytes' Linear4bit or Linear8bitLt"):
        lora.adapt_quantized(nn.Linear(4, 4), r=2, lora_alpha=2)
    unquantized = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(ValueError, match="not quantized yet"):
        lora.adapt_quantized(unquantized, r=2, lora_alpha=2)
    with pytest.raises(ValueError, match="not int8 yet"):
        lora.adapt_quantized(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), r=2, lora_alpha=2)
    repacked = quantize("nf4")
    repacked.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="ran in eval mode"):
        lora.adapt_quantized(repacked, r=2, lora_alpha=2)
    with pytest.raises(TypeError, match="use from_base"):
        lora.Linear4bit(64, 64, r=2)


def test_asking_for_other_names_of_the_package_fails_as_usual() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Linear2bit'"):
        _ = lora.Linear2bit
