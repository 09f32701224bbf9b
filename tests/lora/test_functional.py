"""The mathematics: gradients, precision, memory, and the company it keeps (compile, checkpoint, autocast, vmap)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lory.lora import Linear, adapted_linear, delta_weight, functional, low_rank


def _make(
    *shape: int, out: int = 5, rank: int = 3, dtype: torch.dtype = torch.float64, bias: bool = True
) -> dict[str, Any]:
    """Random tensors for an input of `shape`; the weight is frozen."""
    generator = torch.Generator().manual_seed(sum(shape) + out)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    return {
        "x": draw(*shape).requires_grad_(),
        "weight": draw(out, shape[-1]),
        "bias": draw(out) if bias else None,
        "lora_A": draw(rank, shape[-1]).requires_grad_(),
        "lora_B": draw(out, rank).requires_grad_(),
        "scaling": 1.7,
    }


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, *adapter: Any) -> Tensor:
    y = F.linear(x, weight, bias)
    return y + low_rank(x, *adapter).to(y.dtype)


SHAPES = [(7, 3), (2, 3, 4), (1, 1, 1), (0, 3), (2, 0, 3), (5,), (2, 3, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_derivatives(shape: tuple[int, ...], bias: bool) -> None:
    inputs = _make(*shape, bias=bias)
    assert torch.autograd.gradcheck(adapted_linear, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(adapted_linear, tuple(inputs.values()))


@pytest.mark.parametrize("block", [4, 10**6])
def test_gradients_with_dropout_are_the_derivatives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK", block)
    inputs = _make(3, 4)

    def run(*arguments: Any) -> Tensor:
        torch.manual_seed(0)
        return adapted_linear(*arguments, 0.4)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()))


def test_a_trained_base_gets_its_gradients_too() -> None:
    inputs = _make(2, 3, 4)
    inputs["weight"].requires_grad_()
    inputs["bias"].requires_grad_()
    assert torch.autograd.gradcheck(adapted_linear, tuple(inputs.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make_view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x.expand(4, 6, 8)])
def test_non_contiguous_inputs_equal_plain_operations(make_view: Any, dropout: float) -> None:
    inputs = _make(1, 6, 8)
    x, *rest = inputs.values()
    results = []
    for function in (adapted_linear, _plain):
        torch.manual_seed(1)
        y = function(make_view(x), *rest, dropout)
        gradients = torch.autograd.grad(y.sin().sum(), (x, inputs["lora_A"], inputs["lora_B"]))
        results.append([y, *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block", [1, 16, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_size_of_the_blocks_does_not_matter(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _make(3, 7, 5, dtype=torch.float64)
    for key in ("x", "weight", "bias"):
        inputs[key] = inputs[key].detach().to(dtype).requires_grad_(key == "x")
    monkeypatch.setattr(functional, "_BLOCK", block)
    results = []
    for function in (adapted_linear, _plain):
        torch.manual_seed(5)
        y = function(*inputs.values(), 0.4)
        results.append([y, *torch.autograd.grad(y.sum(), [inputs[key] for key in ("x", "lora_A", "lora_B")])])
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_mixed_precision_equals_plain_operations(dtypes: tuple[str, str], dropout: float) -> None:
    base, adapter = (getattr(torch, name) for name in dtypes)
    inputs = _make(2, 9, 6, dtype=torch.float32)
    inputs = {key: t.detach().to(base) if isinstance(t, Tensor) else t for key, t in inputs.items()}
    inputs["lora_A"], inputs["lora_B"] = inputs["lora_A"].to(adapter), inputs["lora_B"].to(adapter)
    learnt = [inputs[key].requires_grad_() for key in ("x", "lora_A", "lora_B")]
    results = []
    for function in (adapted_linear, _plain):
        torch.manual_seed(2)
        y = function(*inputs.values(), dropout)
        assert y.dtype == base
        results.append([y, *torch.autograd.grad(y.float().square().mean(), learnt)])
    assert [t.dtype for t in results[0]] == [base, base, adapter, adapter]
    torch.testing.assert_close(results[0], results[1], rtol=3e-2, atol=3e-2)


def test_the_adapter_is_multiplied_in_its_own_precision() -> None:
    inputs = _make(64, 32, dtype=torch.float32)
    x, weight = inputs["x"].detach().bfloat16(), torch.zeros(5, 32, dtype=torch.bfloat16)
    y = adapted_linear(x, weight, None, inputs["lora_A"], inputs["lora_B"], 1.0)
    exact = low_rank(x.double(), inputs["lora_A"].double(), inputs["lora_B"].double(), 1.0)
    assert torch.equal(y, exact.bfloat16())


def _kept_bytes(function: Any, inputs: dict[str, Any], dropout: float) -> int:
    """Bytes that a forward keeps for its backward, beyond its own inputs."""
    own = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(*inputs.values(), dropout)
    assert y.requires_grad
    return sum(kept.values())


def test_only_the_small_product_and_a_mask_are_kept_for_the_backward() -> None:
    inputs = _make(4, 32, 48, rank=2, dtype=torch.float32)
    for key in ("x", "weight", "bias"):
        inputs[key] = inputs[key].detach().bfloat16().requires_grad_(key == "x")
    product, mask = 4 * 32 * 2 * 4, 4 * 32 * 48
    assert _kept_bytes(adapted_linear, inputs, 0.0) == product
    assert _kept_bytes(adapted_linear, inputs, 0.1) == product + mask
    assert _kept_bytes(_plain, inputs, 0.1) > 5 * (product + mask)


class _LargestWide(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation makes while the block runs."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_narrow_base_is_never_copied_as_a_whole(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _make(64, 16, out=16, rank=2, dtype=torch.float32)
    for key in ("x", "weight", "bias"):
        inputs[key] = inputs[key].detach().bfloat16().requires_grad_(key == "x")
    monkeypatch.setattr(functional, "_BLOCK", 8 * 16 // torch.get_num_threads())
    with _LargestWide() as seen:
        adapted_linear(*inputs.values(), dropout).sum().backward()
    assert seen.elements == 8 * 16


def test_no_gradient_is_computed_for_a_frozen_weight() -> None:
    inputs = _make(4, 32, out=64, rank=1, dtype=torch.float32)

    def count(*trained: str) -> int:
        for key in ("x", "weight", "lora_A", "lora_B"):
            inputs[key].requires_grad_(key in trained)
        y = adapted_linear(*inputs.values())
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return int(counter.get_total_flops())

    full, by_A, by_B = 2 * 4 * 64 * 32, 2 * 4 * 32, 2 * 4 * 64
    assert count("lora_B") == by_B
    assert count("lora_A") == by_A + by_B
    assert count("lora_A", "lora_B") == by_A + 2 * by_B
    assert count("x", "lora_A", "lora_B") - count("lora_A", "lora_B") in (full, full + by_A)  # addmm_ may not count
    assert count("weight", "lora_A", "lora_B") == full + by_A + 2 * by_B


def test_dropout_drops_what_torch_drops() -> None:
    x, weight, eye = torch.randn(3, 8, 16).transpose(0, 1), torch.zeros(16, 16), torch.eye(16, requires_grad=True)
    torch.manual_seed(3)
    y = adapted_linear(x, weight, None, eye, eye, 1.0, 0.4)
    torch.manual_seed(3)
    torch.testing.assert_close(y, F.dropout(x, 0.4))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_nothing(dropout: float) -> None:
    layer = Linear(6, 4, r=2, lora_dropout=dropout)
    torch.nn.init.normal_(layer.lora_B)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(4)
        x = torch.ones(3, 6, requires_grad=True)
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results, strict=True))


def test_compiles_into_one_graph() -> None:
    layer = Linear(6, 4, r=2)
    torch.nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6, requires_grad=True)
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(compiled(x), layer(x))
    learnt = (x, layer.lora_A, layer.lora_B)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), learnt), torch.autograd.grad(layer(x).sum(), learnt)
    )


def test_autocast_decides_the_dtype() -> None:
    inputs = _make(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted_linear(*inputs.values())
        delta = delta_weight(inputs["lora_A"], inputs["lora_B"], 1.7)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), adapted_linear(*inputs.values()), rtol=5e-2, atol=1e-1)
    y.float().sum().backward()
    assert inputs["lora_A"].grad.dtype == torch.float32
    assert torch.equal(delta, delta_weight(inputs["lora_A"], inputs["lora_B"], 1.7))


def test_gradients_of_single_samples_with_vmap() -> None:
    layer, x = Linear(6, 4, r=2).double(), torch.randn(3, 6, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_B)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        torch.testing.assert_close(gradients["lora_A"][i], layer.lora_A.grad)


def test_delta_weight_is_at_least_fp32() -> None:
    lora_A, lora_B = torch.randn(2, 6).bfloat16(), torch.randn(4, 2).bfloat16()
    assert delta_weight(lora_A, lora_B, 2.0).dtype == torch.float32
    torch.testing.assert_close(delta_weight(lora_A, lora_B, 2.0), 2.0 * lora_B.float() @ lora_A.float())
    assert delta_weight(lora_A.double(), lora_B.double(), 2.0).dtype == torch.float64
