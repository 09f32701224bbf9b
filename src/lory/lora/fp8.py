"""Frozen linear layers whose weights and products are FP8 (e4m3), for GPUs from Hopper on; their adapters are not.

Every row has a scale of its own: each output's row of the weight, each token's row of the input and of the gradient
(as in Micikevicius et al. 2022, arXiv 2209.05433, section 3, with rows in place of tensors). With W = s * Q, where Q is
FP8 and s (out, 1), the products are ``y = s * (Q x)`` and ``dL/dx = Q^T (s * dL/dy)``: the scales of W go into the
gradient before it is rounded, so that forward and backward see the same numbers Q.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lory.lora.few_bits import FewBitsLinear
from lory.lora.linear import Linear

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
# what the products' kernels ask of the sizes of a weight
MULTIPLE = 16


class Rounded(NamedTuple):
    """A matrix ``scale * values``."""

    values: Tensor
    """(n, k) FP8."""
    scale: Tensor
    """(n, 1) fp32."""

    def numbers(self) -> Tensor:
        """(n, k) fp32."""
        return self.values.float() * self.scale


def round_rows(x: Tensor, factors: Tensor | None = None) -> Rounded:
    """x (n, k), each column times its factor (k) if there are any, as FP8 with the largest of each row at FP8's end."""
    return _choose_rounding(x.is_cuda)(x, factors)


def _round_rows(x: Tensor, factors: Tensor | None) -> Rounded:
    wide = x.float() if factors is None else x.float() * factors
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return Rounded((wide / scale).to(DTYPE), scale)


@functools.cache
def _choose_rounding(cuda: bool) -> Callable[[Tensor, Tensor | None], Rounded]:
    """On a GPU the rounding as one kernel, since step by step it takes as long as the product it is made for."""
    if cuda and importlib.util.find_spec("triton"):
        compiled: Callable[[Tensor, Tensor | None], Rounded] = torch.compile(_round_rows, dynamic=True)
        return compiled
    return _round_rows


def multiply(x: Rounded, weight: Rounded, dtype: torch.dtype, fast: bool = True) -> Tensor:
    """``x weight^T``: (T, out) of x (T, in) and weight (out, in).

    Args:
        fast: let a GPU add up in fewer bits than fp32.
    """
    # row-wise scales are for bf16 results; a CPU takes any
    made = torch.bfloat16 if x.values.is_cuda else dtype
    y: Tensor = torch._scaled_mm(
        x.values, weight.values.t(), scale_a=x.scale, scale_b=weight.scale.t(), out_dtype=made, use_fast_accum=fast
    )
    return y.to(dtype)


def multiply_back(grad: Tensor, weight: Rounded) -> Tensor:
    """``grad weight``, (T, in) of grad (T, out): the gradient to x of `multiply`, `grad` rounded with W's scales."""
    # the kernels want both factors with the added-up dimension contiguous; bytes can be copied on every device
    turned = weight.values.view(torch.uint8).t().contiguous().view(DTYPE)
    ones = torch.ones(len(turned), 1, dtype=torch.float32, device=turned.device)
    return multiply(round_rows(grad, weight.scale.squeeze(1)), Rounded(turned, ones), grad.dtype, fast=False)


class LinearFp8(FewBitsLinear):
    """`Linear` over a frozen weight in FP8: y = s * (Q round(x)) + b + scaling * B A x; see `from_layer`.

    `weight` holds Q and the buffer `weight_scale` s.
    """

    held_as = "FP8"
    weight_scale: Tensor

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("LinearFp8 is made from a layer with a plain weight: use from_layer.")

    @classmethod
    def from_layer(cls, base: nn.Linear) -> LinearFp8:
        """A layer with `base`'s weight rounded to FP8, and its bias and adapter, if it has one, shared.

        Args:
            base: an nn.Linear, or a `Linear` whose weight is (out, in).

        Raises:
            ValueError: the weight is trained, or its sizes are no multiples of 16.
        """
        if base.weight.requires_grad:
            raise ValueError("The layer's weight is trained; only a frozen one can be held in FP8.")
        if any(size % MULTIPLE for size in base.weight.shape):
            raise ValueError(f"A weight of {tuple(base.weight.shape)} was given; FP8 products take multiples of 16.")
        layer: LinearFp8 = cls._adopt(base)
        if not isinstance(base, Linear):
            layer._configure(0, 1.0, 0.0, merge_weights=False)
        layer.merge_weights = False
        rounded = round_rows(base.weight.detach())
        layer.weight = nn.Parameter(rounded.values, requires_grad=False)
        layer.register_buffer("weight_scale", rounded.scale)
        return layer

    @property
    def rounded(self) -> Rounded:
        """The weight as it is held."""
        return Rounded(self.weight.detach(), self.weight_scale)

    def base_weight(self) -> Tensor:
        """W as it was rounded, (out, in) in fp32."""
        return self.rounded.numbers()

    def _multiply_frozen(self, x: Tensor) -> Tensor:
        y: Tensor = _FrozenProduct.apply(x, *self.rounded)
        return y


class _FrozenProduct(torch.autograd.Function):
    """`multiply` of x (..., in) with a weight, and `multiply_back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        y = multiply(round_rows(x.flatten(0, -2)), Rounded(values, scale), x.dtype)
        return y.view(*x.shape[:-1], len(values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight = Rounded(*ctx.saved_tensors)
        return multiply_back(grad.flatten(0, -2), weight).view(*grad.shape[:-1], weight.values.shape[1]), None, None
