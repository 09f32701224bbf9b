"""A decoder layer of the Llama family as one autograd function, for training adapters on a frozen base.

Step by step, autograd keeps every intermediate of a layer. Kept here is what costs a product to make again: q, k and v,
the attention's output, the state between the layer's halves, gate and up, and the adapters' narrow products. Norms,
silu(gate) * up and the attention's probabilities are made again in the backward pass. Sums are made in the matrix
products that add to them.

Shapes: T tokens (documents one after the other), H the hidden size, N heads, G heads of keys and values, D numbers of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import lory.lora as lora
from lory.lora.fp8 import LinearFp8
from lory.models.fused_attention import Seen, attend, attend_back
from lory.models.fused_ops import Factors, Kept, Projection, project, project_back
from lory.models.kernels import PLAIN, Kernels
from lory.models.varlen import Recorded, record

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Norm:
    """An RMSNorm, frozen."""

    weight: Tensor
    eps: float
    kernels: Kernels

    @classmethod
    def of(cls, module: nn.Module, kernels: Kernels) -> Norm:
        """What transformers calls variance_epsilon, torch calls eps (and None its dtype's own)."""
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        weight: Tensor = module.weight
        return cls(weight, torch.finfo(weight.dtype).eps if eps is None else eps, kernels)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.normalise(x, self.weight, self.eps)

    def add_gradient(self, total: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        """`total` plus the gradient to x; `total` and `grad` are overwritten."""
        return self.kernels.add_normalise_gradient(total, grad, x, self.weight, self.eps)


@dataclass(frozen=True)
class Layer:
    """One layer at one forward pass: its frozen parts, and its adapters' settings."""

    projections: tuple[Projection, ...]
    """q, k, v, o, gate, up, down; with the adapters' A and B as they were given to autograd."""
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    """Of q and k (Qwen3)."""
    head_dim: int
    seen: Seen
    kernels: Kernels

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with their norms and positions."""
        if self.head_norms:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        return self.kernels.rotate(q, cos, sin), self.kernels.rotate(k, cos, sin)

    def rotated_back(
        self, grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `rotated` to q and k; q and k are looked at where there are norms only."""
        grad_q, grad_k = (self.kernels.rotate(grad, cos, sin, back=True) for grad in (grad_q, grad_k))
        if self.head_norms:
            grad_q = self.head_norms[0].add_gradient(torch.zeros_like(q), grad_q, q)
            grad_k = self.head_norms[1].add_gradient(torch.zeros_like(k), grad_k, k)
        return grad_q, grad_k


def run_layer(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen, kernels: Kernels = PLAIN) -> Tensor:
    """What the decoder layer `module` gives for x (T, H), differentiable in x and in its adapters.

    Args:
        cos, sin: (T, D) of the tokens' positions.
        seen: `scaling` is the attention's own.
    """
    parts = [module.self_attn.get_submodule(name) for name in ATTENTION]
    parts += [module.mlp.get_submodule(name) for name in MLP]
    tensors: list[Tensor] = []
    settings: list[tuple[float, float] | None] = []
    for part in parts:
        adapted = isinstance(part, lora.Linear) and part.has_adapter
        if adapted:
            tensors += [part.lora_A, part.lora_B]
        settings.append((part.scaling, part.lora_dropout if part.training else 0.0) if adapted else None)
    y: Tensor = _FusedLayer.apply(x, cos, sin, module, parts, settings, (seen, kernels), *tensors)
    return y


def _describe(
    module: nn.Module,
    parts: Sequence[nn.Module],
    settings: Sequence[tuple[float, float] | None],
    how: tuple[Seen, Kernels],
    tensors: Sequence[Tensor],
) -> Layer:
    given, (seen, kernels) = iter(tensors), how
    projections = [
        Projection(
            part.rounded if isinstance(part, LinearFp8) else part.weight,
            part.bias,
            Factors(next(given), next(given), *setting) if setting else None,
        )
        for part, setting in zip(parts, settings, strict=True)
    ]
    attention = module.self_attn
    own = hasattr(attention, "q_norm")
    return Layer(
        tuple(projections),
        (Norm.of(module.input_layernorm, kernels), Norm.of(module.post_attention_layernorm, kernels)),
        (Norm.of(attention.q_norm, kernels), Norm.of(attention.k_norm, kernels)) if own else None,
        attention.head_dim,
        seen,
        kernels,
    )


def _cast(tensors: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """The adapters' A and B as they are multiplied: in their own precision, but in x's on a GPU, where the adapter's
    part would otherwise take about half as long as the base's, for its outputs' way to memory and back in fp32."""
    return [tensor.to(x.dtype) for tensor in tensors] if _multiplies_narrowly(x) else tensors


def _multiplies_narrowly(x: Tensor) -> bool:
    return not x.is_cpu


class _FusedLayer(torch.autograd.Function):
    """`run_layer` over tensors: what is differentiated stands first and last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        module: nn.Module,
        parts: Sequence[nn.Module],
        settings: Sequence[tuple[float, float] | None],
        how: tuple[Seen, Kernels],
        *tensors: Tensor,
    ) -> Tensor:
        layer = _describe(module, parts, settings, how, _cast(tensors, x))
        middle, first, kept, ctx.recorded = _forward_attention(layer, x, cos, sin, any(ctx.needs_input_grad))
        z, second, more = _forward_mlp(layer, middle)
        kept = [*kept, *more]
        ctx.arguments = module, parts, settings, how
        ctx.save_for_backward(x, cos, sin, *first, middle, *second, *(t for pair in kept for t in pair), *tensors)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, q, k, v, out, middle, gate, up, *rest = ctx.saved_tensors
        kept = [Kept(*rest[i : i + 2]) for i in range(0, 14, 2)]
        module, parts, settings, how = ctx.arguments
        recorded, ctx.recorded = ctx.recorded, None
        tensors = rest[14:]
        layer = _describe(module, parts, settings, how, _cast(tensors, x))
        below = ctx.needs_input_grad[0] or any(p.factors for p in layer.projections[:4])
        grad_middle, pairs = _backward_mlp(layer, grad, middle, gate, up, kept[4:], below)
        grad_x = None
        if grad_middle is not None:
            saved = (x, q, k, v, recorded)
            need_x = ctx.needs_input_grad[0]
            grad_x, upper = _backward_attention(layer, grad_middle, saved, out, cos, sin, kept[:4], need_x)
            pairs = [*upper, *pairs]
        flat = [g for pair in pairs if pair for g in pair]
        flat = [g.to(tensor.dtype) for g, tensor in zip(flat, tensors, strict=True)]
        return grad_x, None, None, None, None, None, None, *flat


Pairs = list[tuple[Tensor, Tensor] | None]


def _forward_attention(
    layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, learning: bool
) -> tuple[Tensor, tuple[Tensor | None, ...], list[Kept], Recorded | None]:
    """x + attention, (T, H); q, k, v and, for an adapter on o, the attention's output; what the adapters keep; and what
    a device's own attention keeps."""
    made = project(layer.norms[0](x), layer.projections[:3])
    q, k, v = (y.view(len(x), -1, layer.head_dim) for y, _ in made)
    turned_q, turned_k = layer.rotated(q, k, cos, sin)
    recorded = None
    if learning and layer.seen.spans:
        recorded = record(turned_q, turned_k, v, layer.seen.spans, layer.seen.scaling, layer.seen.window)
        out = recorded.out.detach()
    else:
        out = attend(turned_q, turned_k, v, layer.seen)
    if not layer.head_norms:
        q, k = turned_q, turned_k
    [(middle, kept)] = project(out.flatten(1), layer.projections[3:4], residual=x)
    needed = out if layer.projections[3].factors else None
    return middle, (q, k, v, needed), [*(pair for _, pair in made), kept], recorded


def _forward_mlp(layer: Layer, middle: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], list[Kept]]:
    """middle + MLP, (T, H); gate and up, to be kept; what the adapters keep."""
    (gate, first), (up, second) = project(layer.norms[1](middle), layer.projections[4:6])
    [(z, kept)] = project(layer.kernels.gate(gate, up), layer.projections[6:], residual=middle)
    return z, (gate, up), [first, second, kept]


def _backward_mlp(
    layer: Layer, grad: Tensor, middle: Tensor, gate: Tensor, up: Tensor, kept: Sequence[Kept], below: bool
) -> tuple[Tensor | None, Pairs]:
    """The gradients to `middle` (None unless something `below` wants it) and to the adapters."""
    projections = layer.projections
    opened, inner = layer.kernels.gate_again(gate, up, wanted=projections[6].factors is not None)
    need_inner = below or any(p.factors for p in projections[4:6])
    grad_inner, last = project_back([grad], inner, projections[6:], kept[2:], need_inner)
    if grad_inner is None:
        return None, [None, None, *last]
    del inner
    grad_gate, grad_up = layer.kernels.gate_back(grad_inner, gate, up, opened)
    narrow = layer.norms[1](middle) if any(p.factors for p in projections[4:6]) else None
    grad_narrow, pairs = project_back([grad_gate, grad_up], narrow, projections[4:6], kept[:2], below)
    if grad_narrow is None:
        return None, [*pairs, *last]
    return layer.norms[1].add_gradient(grad.clone(), grad_narrow, middle), [*pairs, *last]


def _backward_attention(
    layer: Layer,
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Recorded | None],
    out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kept: Sequence[Kept],
    need_x: bool,
) -> tuple[Tensor | None, Pairs]:
    """The gradients to x (None unless wanted) and to the adapters; `grad` is overwritten."""
    x, q, k, v, recorded = saved
    projections = layer.projections
    inner = any(p.factors for p in projections[:3])
    flat_out = None if out is None else out.flatten(1)
    grad_out, last = project_back([grad], flat_out, projections[3:4], kept[3:], need_x or inner)
    if grad_out is None:
        return None, [None, None, None, *last]
    if recorded:
        grad_q, grad_k, grad_v = recorded.gradients(grad_out.view(q.shape))
    else:
        turned_q, turned_k = layer.rotated(q, k, cos, sin) if layer.head_norms else (q, k)
        grad_q, grad_k, grad_v = attend_back(grad_out.view(q.shape), turned_q, turned_k, v, layer.seen)
    grad_q, grad_k = layer.rotated_back(grad_q, grad_k, q, k, cos, sin)
    narrow = layer.norms[0](x) if inner else None
    grads = [g.flatten(1) for g in (grad_q, grad_k, grad_v)]
    grad_narrow, pairs = project_back(grads, narrow, projections[:3], kept[:3], need_x)
    if grad_narrow is None:
        return None, [*pairs, *last]
    return layer.norms[0].add_gradient(grad, grad_narrow, x), [*pairs, *last]
