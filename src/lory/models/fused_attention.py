"""Causal attention of packed documents, forward and backward by hand, in memory that grows with the tokens.

On a CPU each document is cut into blocks of queries that see all keys up to their own end, as products of matrices;
the probabilities are made again in the backward pass. torch's fused attention takes two to four times as long there.
Other devices have kernels of their own (`lory.models.varlen`).

Shapes: T tokens, N heads, G heads of keys and values, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lory.models.varlen import Spans, attend_spans

# Queries of a block: small blocks compute little that is masked, large ones make fewer calls
BLOCK_TOKENS = 64
# A document up to this long is one block
WHOLE_TOKENS = 96


class Seen(NamedTuple):
    """Which tokens attend to which."""

    borders: tuple[int, ...]
    """(documents + 1) from 0 to T."""
    scaling: float
    window: int | None = None
    """A token sees this many tokens, itself included."""
    spans: Spans | None = None
    """The borders for the kernels of a device; None: in blocks, as on a CPU."""


class _Block(NamedTuple):
    """Queries of one document and the keys that they see."""

    queries: slice
    keys: slice


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Attention of q (T, N, D) to k and v (T, G, D): (T, N, D)."""
    if seen.spans:
        return attend_spans(q, k, v, seen.spans, seen.scaling, seen.window)
    out = torch.empty_like(q)
    for blocks in _cut_documents(seen):
        for block in blocks:
            weights = _weigh(_group(q, block.queries, k.shape[1]), k, block, seen)
            _ungroup(weights @ _by_head(v, block.keys), out, block.queries)
    return out


def attend_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend` in blocks to q, k and v; `grad` is (T, N, D)."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = k.shape[1]
    for blocks in _cut_documents(seen):
        for block in blocks:
            queries, arriving = _group(q, block.queries, groups), _group(grad, block.queries, groups)
            keys, values = _by_head(k, block.keys), _by_head(v, block.keys)
            weights = _weigh(queries, k, block, seen)
            grad_scores = torch.ops.aten._softmax_backward_data(
                arriving @ values.transpose(1, 2), weights, -1, weights.dtype
            ).mul_(seen.scaling)
            _ungroup(grad_scores @ keys, grad_q, block.queries)
            grad_k[block.keys] += (grad_scores.transpose(1, 2) @ queries).transpose(0, 1)
            grad_v[block.keys] += (weights.transpose(1, 2) @ arriving).transpose(0, 1)
    return grad_q, grad_k, grad_v


class Attention(torch.autograd.Function):
    """`attend` for autograd: ``Attention.apply(q, k, v, seen)``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.seen = seen
        return attend(q, k, v, seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return *attend_back(grad.contiguous(), q, k, v, ctx.seen), None


def _cut_documents(seen: Seen) -> Iterator[list[_Block]]:
    """The blocks of each document; tokens are counted from the row's beginning."""
    for start, end in zip(seen.borders[:-1], seen.borders[1:], strict=True):
        step = BLOCK_TOKENS if end - start > WHOLE_TOKENS else WHOLE_TOKENS
        blocks = []
        for first in range(start, end, step):
            last = min(first + step, end)
            oldest = start if seen.window is None else max(start, first - seen.window + 1)
            blocks.append(_Block(slice(first, last), slice(oldest, last)))
        yield blocks


def _by_head(x: Tensor, tokens: slice) -> Tensor:
    """(T, G, D) to (G, t, D)."""
    return x[tokens].transpose(0, 1).contiguous()


def _group(x: Tensor, tokens: slice, groups: int) -> Tensor:
    """(T, N, D) to (G, t * N / G, D): the heads that share keys stand below each other, token by token."""
    part = x[tokens]
    return part.view(len(part), groups, -1, part.shape[-1]).transpose(0, 1).reshape(groups, -1, part.shape[-1])


def _ungroup(part: Tensor, out: Tensor, tokens: slice) -> None:
    """Write what `_group` would have taken from `out`."""
    place = out[tokens]
    groups, _, width = part.shape
    view = place.view(len(place), groups, -1, width)
    view.copy_(part.view(groups, len(place), -1, width).transpose(0, 1))


def _weigh(queries: Tensor, k: Tensor, block: _Block, seen: Seen) -> Tensor:
    """The probabilities (G, t * N / G, keys) of a block's queries (G, t * N / G, D)."""
    scores = (queries * seen.scaling) @ _by_head(k, block.keys).transpose(1, 2)
    length, width = block.queries.stop - block.queries.start, block.keys.stop - block.keys.start
    spread = scores.view(len(scores), length, -1, width)
    if seen.window is not None and width > seen.window:
        spread.masked_fill_(_hidden(block, seen.window, scores.device)[:, None], -torch.inf)
    elif length > 1:
        # only the block's own keys can lie ahead of a query
        ahead = torch.full((length, length), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
        spread[..., width - length :] += ahead[:, None]
    precise = torch.promote_types(scores.dtype, torch.float32)
    return F.softmax(scores, dim=-1, dtype=precise).to(scores.dtype)


def _hidden(block: _Block, window: int, device: torch.device) -> Tensor:
    """(t, keys) true where a query must not look: ahead, or further back than the window."""
    queries = torch.arange(block.queries.start, block.queries.stop, device=device)[:, None]
    keys = torch.arange(block.keys.start, block.keys.stop, device=device)
    return (keys > queries) | (queries - keys >= window)
