"""Matrix products on a CPU: fp32 by the faster path where it is as exact, and the head's wide ones in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Relative error allowed against fp64, as a multiple of the default path's own
_TOLERANCE = 3.0
# Inner dimension of one product in `multiply_wide`
_INNER = 4096


def choose_fp32_matmul(device: torch.device) -> str:
    """Let fp32 products go through oneDNN's packed path where that keeps fp32's accuracy; returns what was chosen.

    The setting is named after bf16, but on CPUs without AMX tiles oneDNN computes in fp32 all the same, at about twice
    the speed of the default path. Where it really rounds to bf16 the measured error shows it, and nothing is changed.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32 products: default path"
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None or settings.fp32_precision == "bf16":
        return "fp32 products: as set before"
    before = settings.fp32_precision
    default_error = _measure_error()
    settings.fp32_precision = "bf16"
    error = _measure_error()
    if error <= _TOLERANCE * default_error:
        return f"fp32 products: oneDNN (measured error {error:.1e}, default path {default_error:.1e})"
    settings.fp32_precision = before
    return (
        f"fp32 products: default path (oneDNN's error {error:.1e} is too large, the default's is {default_error:.1e})"
    )


def _measure_error() -> float:
    """Error of an fp32 product against fp64, relative to the result's norm, at a size where the fast path is taken."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 576, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    return float((torch.nn.functional.linear(a, b).double() - exact).norm() / exact.norm())


def multiply_wide(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``, differentiable in x alone: (n, in) and (out, in) to (n, out), where `out` is a vocabulary's size.

    The gradient's product has the vocabulary as its inner dimension, for which oneDNN's blocks on a CPU do not fit the
    cache; in parts of it, one added to the other, it takes five sixths of the time.
    """
    y: Tensor = _WideProduct.apply(x, weight)
    return y


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        total: Tensor | None = None
        for part, rows in zip(grad.split(_INNER, dim=1), weight.split(_INNER), strict=True):
            total = part @ rows if total is None else total.addmm_(part, rows)
        assert total is not None
        return total, None
