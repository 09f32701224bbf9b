"""Causal attention of packed documents, forward and backward by hand, in memory that grows with the tokens.

On a CPU each document is cut into blocks of queries that see all keys up to their own end, as products of matrices;
the probabilities are made again in the backward pass. torch's fused attention takes two to four times as long there.
Other devices have kernels of their own (`lory.models.varlen`).

Shapes: T tokens, N heads, G heads of keys and values, D numbers of a head.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    """Queries of one document, `length` from `first` on, and the keys that they see, `width` from `oldest` on."""

    first: int
    length: int
    oldest: int
    width: int


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Attention of q (T, N, D) to k and v (T, G, D): (T, N, D)."""
    if seen.spans:
        return attend_spans(q, k, v, seen.spans, seen.scaling, seen.window)
    out = torch.empty_like(q)
    groups = k.shape[1]
    q, k, v, places = _by_group(q, groups), k.transpose(0, 1), v.transpose(0, 1), _by_group(out, groups)
    for block in _cut_documents(seen.borders, seen.window, BLOCK_TOKENS, WHOLE_TOKENS):
        weights = _weigh(_take(q, block), _see(k, block), block, seen)
        _put(torch.bmm(weights, _see(v, block)), places, block)
    return out


def attend_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend` in blocks to q, k and v; `grad` is (T, N, D)."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = k.shape[1]
    q, grad, places = (_by_group(x, groups) for x in (q, grad, grad_q))
    k, v, sum_k, sum_v = (x.transpose(0, 1) for x in (k, v, grad_k, grad_v))
    unused = q.new_zeros(())
    for block in _cut_documents(seen.borders, seen.window, BLOCK_TOKENS, WHOLE_TOKENS):
        queries, arriving, keys, values = _take(q, block), _take(grad, block), _see(k, block), _see(v, block)
        weights = _weigh(queries, keys, block, seen)
        grad_scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(arriving, values.transpose(1, 2)), weights, -1, weights.dtype
        )
        _put(torch.baddbmm(unused, grad_scores, keys, beta=0, alpha=seen.scaling), places, block)
        part = torch.baddbmm(unused, grad_scores.transpose(1, 2), queries, beta=0, alpha=seen.scaling)
        sum_k.narrow(1, block.oldest, block.width).add_(part)
        sum_v.narrow(1, block.oldest, block.width).add_(torch.bmm(weights.transpose(1, 2), arriving))
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


@functools.lru_cache(maxsize=16)
def _cut_documents(borders: tuple[int, ...], window: int | None, tokens: int, whole: int) -> tuple[_Block, ...]:
    """The blocks of all documents; tokens are counted from the row's beginning."""
    blocks = []
    for start, end in itertools.pairwise(borders):
        step = tokens if end - start > whole else whole
        for first in range(start, end, step):
            last = min(first + step, end)
            oldest = start if window is None else max(start, first - window + 1)
            blocks.append(_Block(first, last - first, oldest, last - oldest))
    return tuple(blocks)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """A view of (T, N, D) as (G, T, N / G, D): by the keys that heads share."""
    return x.view(len(x), groups, -1, x.shape[-1]).transpose(0, 1)


def _take(x: Tensor, block: _Block) -> Tensor:
    """The block's queries of (G, T, N / G, D) as (G, t * N / G, D), a head's row below the other's of its token."""
    return x.narrow(1, block.first, block.length).reshape(len(x), -1, x.shape[-1])


def _put(part: Tensor, places: Tensor, block: _Block) -> None:
    """Write what `_take` would have taken from `places`."""
    places.narrow(1, block.first, block.length).copy_(part.view(len(part), block.length, -1, part.shape[-1]))


def _see(x: Tensor, block: _Block) -> Tensor:
    """The block's keys of (G, T, D), in memory of their own: oneDNN's products take nothing else."""
    return x.narrow(1, block.oldest, block.width).contiguous()


def _weigh(queries: Tensor, keys: Tensor, block: _Block, seen: Seen) -> Tensor:
    """The probabilities (G, t * N / G, keys) of a block's queries (G, t * N / G, D)."""
    scores = torch.baddbmm(queries.new_zeros(()), queries, keys.transpose(1, 2), beta=0, alpha=seen.scaling)
    _, length, _, width = block
    shared = queries.shape[1] // length
    if seen.window is not None and width > seen.window:
        scores.masked_fill_(_hidden(block, seen.window, scores.device).repeat_interleave(shared, 0), -torch.inf)
    elif length > 1:
        # only the block's own keys can lie ahead of a query
        scores.narrow(2, width - length, length).add_(_ahead(length, shared, scores.dtype, scores.device))
    precise = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, -1, precise).to(scores.dtype)


@functools.lru_cache(maxsize=64)
def _ahead(length: int, shared: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length * shared, length) minus infinity where a key lies ahead of a query, else zero."""
    ahead = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu_(1)
    return ahead.repeat_interleave(shared, 0)


def _hidden(block: _Block, window: int, device: torch.device) -> Tensor:
    """(t, keys) true where a query must not look: ahead, or further back than the window."""
    queries = torch.arange(block.first, block.first + block.length, device=device)[:, None]
    keys = torch.arange(block.oldest, block.oldest + block.width, device=device)
    return (keys > queries) | (queries - keys >= window)
