"""The parts of a decoder layer as pairs of plain functions, forward and backward, for `lory.models.fused_layer`.

Shapes: T tokens (documents one after the other), N heads, D numbers of a head, R a rank. Nothing here is seen by
autograd. Arguments that a function overwrites are named in its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lory.lora.fp8 import Rounded, multiply, multiply_back, round_rows
from lory.models.fused_memory import Room


def measure_scale(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, kept: (..., 1) in fp32 or higher (RMSNorm)."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalise(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4): ``weight * (x * scale)``, as transformers
    rounds it: the inner product in `scale`'s dtype, the outer in x's."""
    y = x * scale
    return y.mul_(weight) if y.dtype == x.dtype else y.to(x.dtype).mul_(weight)


def add_normalise_gradient(total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`total` plus the gradient of `normalise` to x; `total` and `grad` are overwritten.

    With g = weight * grad: ``dx = scale * g - x * scale^3 * mean(g * x)``.
    """
    precise = scale.dtype
    grad = grad.mul_(weight).to(precise)
    wide = x.to(precise)
    factor = (grad * wide).mean(-1, keepdim=True).mul_(scale.square()).mul_(scale)
    change = grad.mul_(scale).addcmul_(wide, factor, value=-1.0)
    return total.add_(change)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864, equation 34) with the halves paired, as transformers does.

    Args:
        x: (T, N, D).
        cos, sin: (T, D).
        back: give the transposed product instead, which is the gradient's way.
        out: (T, N, D) where the result goes; None: memory of its own.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    y = torch.mul(x, cos, out=out)
    # y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; transposed: y1 = x1 c1 + x2 s2, y2 = x2 c2 - x1 s1
    first, second = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    sign = 1.0 if back else -1.0
    y[..., :half].addcmul_(x[..., half:], first, value=sign)
    y[..., half:].addcmul_(x[..., :half], second, value=-sign)
    return y


def score(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scores before the softmax, `scaling` times queries (B, t, D) with keys (B, u, D): (B, t, u) in fp32 or higher."""
    scores = torch.baddbmm(queries.new_zeros(()), queries, keys.transpose(1, 2), beta=0, alpha=scaling)
    # by itself: softmax takes three times as long where it converts, too
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def attend_plainly_back(
    arriving: Tensor, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weights @ values to queries (B, t, D), keys and values (B, u, D), where `weights` (B, t, u) are
    the softmax of the scores; `arriving` is (B, t, D)."""
    unused = queries.new_zeros(())
    grad_scores = torch.ops.aten._softmax_backward_data(
        torch.bmm(arriving, values.transpose(1, 2)), weights, -1, weights.dtype
    )
    grad_queries = torch.baddbmm(unused, grad_scores, keys, beta=0, alpha=scaling)
    grad_keys = torch.baddbmm(unused, grad_scores.transpose(1, 2), queries, beta=0, alpha=scaling)
    return grad_queries, grad_keys, torch.bmm(weights.transpose(1, 2), arriving)


class Factors(NamedTuple):
    """A projection's adapter."""

    lora_A: Tensor
    """(R, in)"""
    lora_B: Tensor
    """(out, R)"""
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer with or without an adapter."""

    weight: Tensor | Rounded
    """(out, in)"""
    bias: Tensor | None
    factors: Factors | None

    @property
    def outputs(self) -> int:
        """How many numbers it gives for a token."""
        return len(self.weight.values if isinstance(self.weight, Rounded) else self.weight)


class Kept(NamedTuple):
    """What the backward of an adapter needs beside the layer's input; both None without an adapter."""

    h: Tensor | None = None
    """(T, R) A dropout(x)."""
    mask: Tensor | None = None
    """(T, in) what the dropout kept."""


def project(
    x: Tensor,
    projections: Sequence[Projection],
    outs: Sequence[Tensor | None],
    room: Room,
    residual: Tensor | None = None,
) -> list[tuple[Tensor, Kept]]:
    """``W x + bias + scaling * B A dropout(x)`` of each projection: (T, out), and what its backward needs.

    Args:
        x: (T, in), the input that the projections share.
        outs: (T, out) where each output goes; None: memory of its own.
        room: for what the backward needs.
        residual: (T, out) added to the outputs.
    """
    narrow = _project_down(x, projections, room)
    # once for all that share it
    rounded = round_rows(x) if any(isinstance(p.weight, Rounded) for p in projections) else None
    results = []
    for projection, shared, out in zip(projections, narrow, outs, strict=True):
        y = _project_base(x, rounded, projection, residual, out)
        kept = shared
        if factors := projection.factors:
            if shared.h is None:
                kept = _drop_and_project(x.to(factors.lora_A.dtype), factors)
            assert kept.h is not None
            y = _add_product(y, kept.h, factors.lora_B.t(), factors.scaling)
        results.append((y, kept))
    return results


def _drop_and_project(x: Tensor, factors: Factors) -> Kept:
    """A dropout(x), with the mask that F.dropout and lory's own layers draw under the same seed."""
    if x.is_cpu:
        mask = torch.empty_like(x, dtype=torch.uint8).bernoulli_(1.0 - factors.dropout)
        return Kept((_apply_mask(x, mask) @ factors.lora_A.t()).div_(1.0 - factors.dropout), mask)
    dropped, mask = torch.native_dropout(x, factors.dropout, True)
    return Kept(dropped @ factors.lora_A.t(), mask)


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is one, else zero, in x's dtype; a CPU multiplies two dtypes by way of copies."""
    return mask.to(x.dtype).mul_(x)


def _add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``y + scaling * left right`` in place of y, rounded once."""
    precise = torch.promote_types(y.dtype, left.dtype)
    total = y.to(precise).addmm_(left.to(precise), right.to(precise), alpha=scaling)
    return y if total is y else y.copy_(total)


def _project_base(
    x: Tensor, rounded: Rounded | None, projection: Projection, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """``W x + bias`` in `out` or a tensor of its own, with the residual added."""
    weight, bias = projection.weight, projection.bias
    if isinstance(weight, Rounded):
        assert rounded is not None
        y = multiply(rounded, weight, x.dtype)
        y = y if residual is None else y.add_(residual)
        y = y if bias is None else y.add_(bias)
        return y if out is None else out.copy_(y)
    if residual is not None:
        y = torch.addmm(residual, x, weight.t(), out=out)
        return y if bias is None else y.add_(bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _project_base_back(grads: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor:
    """The gradient to the shared x of `_project_base`."""
    total: Tensor | None = None
    for grad, projection in zip(grads, projections, strict=True):
        weight = projection.weight
        if isinstance(weight, Rounded):
            part = multiply_back(grad, weight)
            total = part if total is None else total.add_(part)
        else:
            total = grad @ weight if total is None else total.addmm_(grad, weight)
    assert total is not None
    return total


def _sharing(projections: Sequence[Projection]) -> list[Factors]:
    """The adapters that see x as it is, whose A can be stacked into one matrix."""
    return [p.factors for p in projections if p.factors and not p.factors.dropout]


def _project_down(x: Tensor, projections: Sequence[Projection], room: Room) -> list[Kept]:
    """x A^T of the adapters without dropout, by one product: A's few rows alone leave a CPU waiting."""
    sharing = _sharing(projections)
    if not sharing:
        return [Kept()] * len(projections)
    stacked = torch.cat([factors.lora_A for factors in sharing]) if len(sharing) > 1 else sharing[0].lora_A
    out = room.take((len(x), len(stacked)), stacked.dtype)
    h = torch.mm(x.to(stacked.dtype), stacked.t(), out=out)
    parts = iter(h.split([len(factors.lora_A) for factors in sharing], dim=1))
    return [Kept(next(parts)) if p.factors and not p.factors.dropout else Kept() for p in projections]


def project_back(
    grads: Sequence[Tensor], x: Tensor | None, projections: Sequence[Projection], kept: Sequence[Kept], need_x: bool
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor] | None]]:
    """The gradients of `project` to its input (None unless `need_x`) and to each projection's A and B.

    Args:
        grads: (T, out) of each projection.
        x: (T, in) the input; needed where there is an adapter.
    """
    grad_x = _project_base_back(grads, projections) if need_x else None
    narrow: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for grad, projection, (h, mask) in zip(grads, projections, kept, strict=True):
        factors = projection.factors
        if factors is None:
            pairs.append(None)
            continue
        assert h is not None
        assert x is not None
        lora_A, lora_B, scaling, dropout = factors
        wide = grad.to(lora_A.dtype)
        grad_h = (wide @ lora_B).mul_(scaling / (1.0 - dropout))
        # transposed at the end: the wide matrix is read along its rows
        grad_B = (h.t() @ wide).mul_(scaling).t()
        if mask is None:
            narrow.append(grad_h)
            pairs.append((grad_h, grad_B))  # grad_A takes its place below
            continue
        pairs.append((grad_h.t() @ _apply_mask(x.to(lora_A.dtype), mask), grad_B))
        if grad_x is not None:
            grad_x += _apply_mask(grad_h @ lora_A, mask).to(grad_x.dtype)
    if narrow:
        assert x is not None
        grad_x = _share_back(narrow, x, projections, pairs, grad_x)
    return grad_x, pairs


def _share_back(
    narrow: list[Tensor],
    x: Tensor,
    projections: Sequence[Projection],
    pairs: list[tuple[Tensor, Tensor] | None],
    grad_x: Tensor | None,
) -> Tensor | None:
    """The gradients to x and A of the adapters whose A were stacked; `pairs` gets the latter."""
    sharing = _sharing(projections)
    stacked = torch.cat([factors.lora_A for factors in sharing]) if len(sharing) > 1 else sharing[0].lora_A
    grad_h = torch.cat(narrow, dim=1) if len(narrow) > 1 else narrow[0]
    parts = iter((grad_h.t() @ x.to(stacked.dtype)).split([len(factors.lora_A) for factors in sharing]))
    for index, projection in enumerate(projections):
        pair = pairs[index]
        if pair is not None and projection.factors and not projection.factors.dropout:
            pairs[index] = (next(parts), pair[1])
    return grad_x if grad_x is None else _add_product(grad_x, grad_h, stacked, 1.0)
