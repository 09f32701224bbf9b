"""A decoder layer of the Llama family as one autograd function, for training adapters on a frozen base.

Step by step, autograd keeps every intermediate of a layer. Kept here is what costs a product to make again: q, k and v,
the attention's output, the state between the layer's halves, gate and up, and the adapters' narrow products. Norms,
silu(gate) * up and the attention's probabilities are made again in the backward pass. Sums are made in the matrix
products that add to them.

Shapes: T tokens (documents one after the other), W of them wanted of the layer, H the hidden size, N heads, G heads of
keys and values, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import lory.lora as lora
from lory.lora.fp8 import LinearFp8
from lory.models.fused_attention import Seen, attend, attend_back
from lory.models.fused_memory import Room
from lory.models.fused_ops import Factors, Kept, Projection, project, project_back
from lory.models.kernels import PLAIN, Kernels
from lory.models.varlen import Recorded, record

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# Tokens of a part of the MLP: what is made on the way exists for one part at a time. In parts of 256 tokens a step
# takes 5% longer, as the weights come from memory for each
PART_TOKENS = 1024


How = tuple[Seen, Kernels, Tensor | None, bool]
"""Who sees whom, by which kernels, which tokens are wanted, and whether gradients are."""


class Opened(NamedTuple):
    """What the MLP keeps of a part of the tokens."""

    gate: Tensor
    up: Tensor
    first: Kept
    second: Kept
    third: Kept

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Opened:
        """The eight tensors that autograd saved."""
        gate, up, *rest = tensors
        first, second, third = (Kept(*rest[i : i + 2]) for i in range(0, 6, 2))
        return cls(gate, up, first, second, third)


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
    wanted: Tensor | None = None
    """(W) the tokens that get an output; None: all, and W is T."""

    def parts(self, x: Tensor) -> list[slice]:
        """Parts of the tokens of x that the MLP takes one after the other, for less memory on a CPU; one part where
        dropout draws for all tokens at once, and on devices that like large products."""
        mlp = self.projections[4:]
        drops = any(p.factors and p.factors.dropout for p in mlp)
        if not x.is_cpu or drops or not len(x):
            return [slice(None)]
        count = max(1, round(len(x) / PART_TOKENS))
        size = -(-len(x) // count)
        return [slice(start, start + size) for start in range(0, len(x), size)]

    def rotated(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, outs: Sequence[Tensor | None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """q and k with their norms and positions, in `outs` (T, N * D) and (T, G * D), where given."""
        if self.head_norms:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        places = [out if out is None else out.view(x.shape) for x, out in zip((q, k), outs, strict=True)]
        return self.kernels.rotate(q, cos, sin, out=places[0]), self.kernels.rotate(k, cos, sin, out=places[1])

    def room(self, x: Tensor) -> Room:
        """Room for what the layer keeps of x (T, H) and gives, on a CPU: other devices' allocators see to gaps, and
        what their kernels were `recorded` with must not lie where more is written."""
        if not x.is_cpu or self.seen.spans:
            return Room(x)
        few = len(x) if self.wanted is None else len(self.wanted)
        numbers = 0
        for rows, projection in zip([len(x)] * 3 + [few] * 4, self.projections, strict=True):
            rank = len(projection.factors.lora_A) if projection.factors else 0
            numbers += rows * (projection.outputs + rank)
        # of the MLP four from each part: gate, up and two narrow ones
        return Room(x, 7 + 4 * len(self.parts(x)), numbers)

    def rotated_back(
        self, grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `rotated` to q and k; q and k are looked at where there are norms only."""
        grad_q, grad_k = (self.kernels.rotate(grad, cos, sin, back=True) for grad in (grad_q, grad_k))
        if self.head_norms:
            grad_q = self.head_norms[0].add_gradient(torch.zeros_like(q), grad_q, q)
            grad_k = self.head_norms[1].add_gradient(torch.zeros_like(k), grad_k, k)
        return grad_q, grad_k


def run_layer(
    module: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seen: Seen,
    kernels: Kernels = PLAIN,
    wanted: Tensor | None = None,
) -> Tensor:
    """What the decoder layer `module` gives for x (T, H), differentiable in x and in its adapters.

    Args:
        cos, sin: (T, D) of the tokens' positions.
        seen: `scaling` is the attention's own.
        wanted: (W) the tokens whose output is needed; None: all.

    Returns:
        (W, H).
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
    # inside of the function gradients are always off, so it cannot tell an evaluation itself
    how = seen, kernels, wanted, torch.is_grad_enabled()
    y: Tensor = _FusedLayer.apply(x, cos, sin, module, parts, settings, how, *tensors)
    return y


def _describe(
    module: nn.Module,
    parts: Sequence[nn.Module],
    settings: Sequence[tuple[float, float] | None],
    how: How,
    tensors: Sequence[Tensor],
) -> Layer:
    given, (seen, kernels, wanted, _) = iter(tensors), how
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
        wanted,
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
        how: How,
        *tensors: Tensor,
    ) -> Tensor:
        layer = _describe(module, parts, settings, how, _cast(tensors, x))
        learning = how[-1] and any(ctx.needs_input_grad)
        room = layer.room(x) if learning else Room(x)
        middle, first, kept, ctx.recorded = _forward_attention(layer, x, cos, sin, room, learning)
        z, opened = _forward_mlp(layer, middle, room)
        ctx.arguments = module, parts, settings, how
        narrow = (t for pair in kept for t in pair)
        wide = (t for gate, up, *pairs in opened for t in (gate, up, *(t for pair in pairs for t in pair)))
        ctx.save_for_backward(x, cos, sin, *first, middle, *narrow, *tensors, *wide)
        ctx.adapted = len(tensors)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, q, k, v, out, middle, *rest = ctx.saved_tensors
        kept = [Kept(*rest[i : i + 2]) for i in range(0, 8, 2)]
        tensors, wide = rest[8 : 8 + ctx.adapted], rest[8 + ctx.adapted :]
        opened = [Opened.of(wide[i : i + 8]) for i in range(0, len(wide), 8)]
        module, parts, settings, how = ctx.arguments
        recorded, ctx.recorded = ctx.recorded, None
        layer = _describe(module, parts, settings, how, _cast(tensors, x))
        below = ctx.needs_input_grad[0] or any(p.factors for p in layer.projections[:4])
        grad_middle, pairs = _backward_mlp(layer, grad, middle, opened, below)
        grad_x = None
        if grad_middle is not None:
            saved = (x, q, k, v, recorded)
            need_x = ctx.needs_input_grad[0]
            grad_x, upper = _backward_attention(layer, grad_middle, saved, out, cos, sin, kept, need_x)
            pairs = [*upper, *pairs]
        flat = [g for pair in pairs if pair for g in pair]
        flat = [g.to(tensor.dtype) for g, tensor in zip(flat, tensors, strict=True)]
        return grad_x, None, None, None, None, None, None, *flat


Pairs = list[tuple[Tensor, Tensor] | None]


def _forward_attention(
    layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, room: Room, learning: bool
) -> tuple[Tensor, tuple[Tensor | None, ...], list[Kept], Recorded | None]:
    """x + attention, (W, H); q, k, v and, for an adapter on o, the attention's output; what the adapters keep; and what
    a device's own attention keeps."""
    stays = [room.take((len(x), p.outputs), x.dtype) for p in layer.projections[:3]]
    outs, turned = (stays, [None, None]) if layer.head_norms else ([None, None, stays[2]], stays[:2])
    made, pairs = zip(*project(layer.norms[0](x), layer.projections[:3], outs, room), strict=True)
    q, k, v = (y.view(len(x), -1, layer.head_dim) for y in made)
    del made  # what is not kept makes way for what comes
    turned_q, turned_k = layer.rotated(q, k, cos, sin, turned)
    if not layer.head_norms:
        q, k = turned_q, turned_k
    recorded = None
    if learning and layer.seen.spans:
        recorded = record(turned_q, turned_k, v, layer.seen.spans, layer.seen.scaling, layer.seen.window)
        out = recorded.out.detach()
    else:
        out = attend(turned_q, turned_k, v, layer.seen)
    if layer.wanted is not None:
        out, x = out[layer.wanted], x[layer.wanted]
    [(middle, kept)] = project(out.flatten(1), layer.projections[3:4], [room.take(tuple(x.shape), x.dtype)], room, x)
    needed = out if layer.projections[3].factors else None
    return middle, (q, k, v, needed), [*pairs, kept], recorded


def _forward_mlp(layer: Layer, middle: Tensor, room: Room) -> tuple[Tensor, list[Opened]]:
    """middle + MLP, (W, H); and what to keep of each part of the tokens."""
    z, kept, parts = room.take(tuple(middle.shape), middle.dtype), [], layer.parts(middle)
    if z is None and len(parts) > 1:
        z = torch.empty_like(middle)
    for rows in parts:
        part = middle[rows]
        outs = [room.take((len(part), p.outputs), part.dtype) for p in layer.projections[4:6]]
        (gate, first), (up, second) = project(layer.norms[1](part), layer.projections[4:6], outs, room)
        out = None if z is None else z[rows]
        [(out, third)] = project(layer.kernels.gate(gate, up), layer.projections[6:], [out], room, part)
        kept.append(Opened(gate, up, first, second, third))
    return out if z is None else z, kept


def _backward_mlp(
    layer: Layer, grad: Tensor, middle: Tensor, opened: Sequence[Opened], below: bool
) -> tuple[Tensor | None, Pairs]:
    """The gradients to `middle` (None unless something `below` wants it) and to the adapters."""
    lengths = [len(part.gate) for part in opened]
    each = zip(grad.split(lengths), middle.split(lengths), opened, strict=True)
    results = [_backward_mlp_part(layer, *part, below) for part in each]
    totals = [_sum_pairs(pairs) for pairs in zip(*(pairs for _, pairs in results), strict=True)]
    return _join([grad for grad, _ in results if grad is not None]) if below else None, totals


def _backward_mlp_part(
    layer: Layer, grad: Tensor, middle: Tensor, part: Opened, below: bool
) -> tuple[Tensor | None, Pairs]:
    """`_backward_mlp` of one part."""
    projections, (gate, up, *kept) = layer.projections, part
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


def _sum_pairs(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """The gradients to an adapter over all parts of the tokens."""
    total: tuple[Tensor, Tensor] | None = None
    for pair in pairs:
        if pair is not None:
            total = pair if total is None else (total[0].add_(pair[0]), total[1].add_(pair[1]))
    return total


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _spread(grad: Tensor, wanted: Tensor, tokens: int) -> Tensor:
    """(T, ...) with the rows of `grad` (W, ...) at their places and zeros elsewhere."""
    return grad.new_zeros(tokens, *grad.shape[1:]).index_copy_(0, wanted, grad)


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
    x, projections = saved[0], layer.projections
    inner = any(p.factors for p in projections[:3])
    flat_out = None if out is None else out.flatten(1)
    grad_out, last = project_back([grad], flat_out, projections[3:4], kept[3:], need_x or inner)
    if grad_out is None:
        return None, [None, None, None, *last]
    if layer.wanted is not None:
        grad_out, grad = (_spread(g, layer.wanted, len(x)) for g in (grad_out, grad))
    grads = _backward_heads(layer, grad_out, saved[1:], cos, sin)
    del grad_out
    narrow = layer.norms[0](x) if inner else None
    grad_narrow, pairs = project_back(grads, narrow, projections[:3], kept[:3], need_x)
    del grads, narrow
    if grad_narrow is None:
        return None, [*pairs, *last]
    return layer.norms[0].add_gradient(grad, grad_narrow, x), [*pairs, *last]


def _backward_heads(
    layer: Layer, grad_out: Tensor, saved: tuple[Tensor, Tensor, Tensor, Recorded | None], cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """The gradients to what q, k and v were projected to."""
    q, k, v, recorded = saved
    arriving = grad_out.view(q.shape)
    if recorded:
        grad_q, grad_k, grad_v = recorded.gradients(arriving)
    else:
        turned_q, turned_k = layer.rotated(q, k, cos, sin) if layer.head_norms else (q, k)
        grad_q, grad_k, grad_v = attend_back(arriving, turned_q, turned_k, v, layer.seen)
    return [g.flatten(1) for g in (*layer.rotated_back(grad_q, grad_k, q, k, cos, sin), grad_v)]
