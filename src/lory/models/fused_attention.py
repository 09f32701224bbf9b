"""Attention of packed documents, forward and backward by hand, in memory that grows with the tokens.

On a CPU each document is cut into blocks of queries that see all keys up to their own end, as products of matrices;
short ones go together (`fused_batches`). The probabilities are made again in the backward pass. torch's fused attention
takes two to four times as long there. Other devices have kernels of their own (`lory.models.varlen`).

Shapes: T tokens, N heads, G heads of keys and values, D numbers of a head.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lory.models.fused_batches import Batch, attend_back_together, attend_together, group_documents
from lory.models.fused_ops import attend_plainly_back, score
from lory.models.fused_prefixes import Path, Run, cut
from lory.models.varlen import Spans, attend_spans

# Queries of a block: small blocks compute little that is masked, large ones make fewer calls
BLOCK_TOKENS = 96
# An image up to this long is one: nothing is masked in it, so that only its memory counts
_WHOLE_IMAGE = 1024
# A document with so many scores, all heads' together, or fewer goes with others: in fp32 its products are work enough
# from 9 heads of 30 tokens on, in half precision from 6 of 115
_FEW_SCORES, _FEW_HALF_SCORES = 8_000, 80_000
# Scores of a head that several blocks of one shape have together at most, since all are in memory at a time
_MOST_SCORES = 2**18


class Seen(NamedTuple):
    """Which tokens attend to which."""

    borders: tuple[int, ...]
    """(documents + 1) from 0 to T."""
    scaling: float
    window: int | None = None
    """A token sees this many tokens, itself included."""
    spans: Spans | None = None
    """The borders for the kernels of a device; None: in blocks, as on a CPU."""
    before: tuple[Path, ...] | None = None
    """(documents) tokens elsewhere in the row that each document begins with; only in blocks."""
    causal: bool = True
    """Whether a token sees what is before it and itself; else all of its document, an image, without a window."""


class _Blocks(NamedTuple):
    """Blocks of one shape, which are attended to in one call: `length` queries of a document and `width` keys each."""

    firsts: tuple[int, ...]
    """(n) where each block's queries begin in the row."""
    keys: tuple[Path, ...]
    """(n) where in the row the keys are that they see."""
    length: int
    width: int


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Attention of q (T, N, D) to k and v (T, G, D): (T, N, D)."""
    if seen.spans:
        return attend_spans(q, k, v, seen.spans, seen.scaling, seen.window)
    out = torch.empty_like(q)
    batches, blocks = _share_out(seen, _limit_length(q), BLOCK_TOKENS)
    for batch in batches:
        attend_together(q, k, v, out, batch, seen.scaling)
    groups = k.shape[1]
    q, k, v, places = _by_group(q, groups), k.transpose(0, 1), v.transpose(0, 1), _by_group(out, groups)
    for alike in blocks:
        weights = _weigh(_take(q, alike), _see(k, alike), alike, seen)
        _put(torch.bmm(weights, _see(v, alike)), places, alike)
    return out


def attend_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend` in blocks to q, k and v; `grad` is (T, N, D)."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    batches, blocks = _share_out(seen, _limit_length(q), BLOCK_TOKENS)
    # these overwrite the sums to which blocks add
    for batch in batches:
        attend_back_together(grad, q, k, v, (grad_q, grad_k, grad_v), batch, seen.scaling)
    groups = k.shape[1]
    q, grad, places = (_by_group(x, groups) for x in (q, grad, grad_q))
    k, v, sum_k, sum_v = (x.transpose(0, 1) for x in (k, v, grad_k, grad_v))
    for alike in blocks:
        queries, arriving, keys, values = _take(q, alike), _take(grad, alike), _see(k, alike), _see(v, alike)
        weights = _weigh(queries, keys, alike, seen)
        parts = attend_plainly_back(arriving, queries, keys, values, weights, seen.scaling)
        _put(parts[0], places, alike)
        _add(parts[1], sum_k, alike)
        _add(parts[2], sum_v, alike)
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
def _share_out(seen: Seen, short: int, tokens: int) -> tuple[tuple[Batch, ...], tuple[_Blocks, ...]]:
    """Batches of documents up to `short` tokens, and the blocks of so many `tokens` of all others, by places in the
    row."""
    alike: dict[tuple[int, int], list[tuple[int, Path]]] = collections.defaultdict(list)
    together = []
    window, causal = seen.window, seen.causal
    befores = seen.before or itertools.repeat(())
    for (start, end), prefix in zip(itertools.pairwise(seen.borders), befores, strict=False):
        if start == end:
            continue
        if not prefix and end - start <= min(short, window or short):
            together.append((start, end))
            continue
        step = tokens if causal or end - start > _WHOLE_IMAGE else _WHOLE_IMAGE
        path = (*prefix, Run(start, end - start))
        # positions in the document are so many less
        shift = start - sum(run.length for run in prefix)
        for first in range(start, end, step):
            last = min(first + step, end)
            oldest = 0 if window is None else max(0, first - shift - window + 1)
            newest = last - shift if causal else end - shift
            alike[last - first, newest - oldest].append((first, cut(path, oldest, newest)))
    blocks = itertools.starmap(_gather, alike.items())
    return group_documents(together, causal), tuple(itertools.chain.from_iterable(blocks))


def _gather(shape: tuple[int, int], blocks: Sequence[tuple[int, Path]]) -> Iterator[_Blocks]:
    """Blocks of one shape, given by where they begin and by their keys, as many at a time as memory allows."""
    most = max(1, _MOST_SCORES // math.prod(shape))
    for start in range(0, len(blocks), most):
        firsts, keys = zip(*blocks[start : start + most], strict=True)
        yield _Blocks(firsts, keys, *shape)


def _limit_length(q: Tensor) -> int:
    """The most tokens of a document that goes with others; 0: none does, since devices have better ways."""
    if not q.is_cpu:
        return 0
    return math.isqrt((_FEW_HALF_SCORES if q.element_size() < 4 else _FEW_SCORES) // q.shape[1])


def _by_group(x: Tensor, groups: int) -> Tensor:
    """A view of (T, N, D) as (G, T, N / G, D): by the keys that heads share."""
    return x.view(len(x), groups, -1, x.shape[-1]).transpose(0, 1)


def _take(x: Tensor, blocks: _Blocks) -> Tensor:
    """The blocks' queries of (G, T, N / G, D) as (G * n, t * N / G, D), a head's row below the other's of its token."""
    parts = [x.narrow(1, first, blocks.length) for first in blocks.firsts]
    return torch.cat(parts, 1).view(len(x) * len(parts), -1, x.shape[-1])


def _put(part: Tensor, places: Tensor, blocks: _Blocks) -> None:
    """Write what `_take` would have taken from `places`."""
    apart = part.view(len(places), len(blocks.firsts), blocks.length, *places.shape[2:])
    for first, piece in zip(blocks.firsts, apart.unbind(1), strict=True):
        places.narrow(1, first, blocks.length).copy_(piece)


def _see(x: Tensor, blocks: _Blocks) -> Tensor:
    """The blocks' keys of (G, T, D) as (G * n, keys, D)."""
    # in memory of their own: oneDNN's products take nothing else
    parts = [x.narrow(1, *run) for run in itertools.chain.from_iterable(blocks.keys)]
    return torch.cat(parts, 1).view(-1, blocks.width, x.shape[-1])


def _add(part: Tensor, sums: Tensor, blocks: _Blocks) -> None:
    """Add to (G, T, D) what belongs to the keys that `_see` gives."""
    runs = list(itertools.chain.from_iterable(blocks.keys))
    pieces = part.view(len(sums), -1, part.shape[-1]).split([run.length for run in runs], 1)
    for run, piece in zip(runs, pieces, strict=True):
        sums.narrow(1, *run).add_(piece)


def _weigh(queries: Tensor, keys: Tensor, blocks: _Blocks, seen: Seen) -> Tensor:
    """The probabilities (G * n, t * N / G, keys) of the blocks' queries (G * n, t * N / G, D)."""
    scores = score(queries, keys, seen.scaling)
    length, width = blocks.length, blocks.width
    shared = queries.shape[1] // length
    if seen.window is not None and width > seen.window:
        scores.masked_fill_(_hidden(blocks, seen.window, scores.device).repeat_interleave(shared, 0), -torch.inf)
    elif seen.causal and length > 1:
        # only a block's own keys can lie ahead of a query
        scores.narrow(2, width - length, length).add_(_ahead(length, shared, scores.dtype, scores.device))
    return torch.softmax(scores, -1).to(queries.dtype)


@functools.lru_cache(maxsize=64)
def _ahead(length: int, shared: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length * shared, length) minus infinity where a key lies ahead of a query, else zero."""
    ahead = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu_(1)
    return ahead.repeat_interleave(shared, 0)


def _hidden(blocks: _Blocks, window: int, device: torch.device) -> Tensor:
    """(t, keys) true where a query must not look: ahead, or further back than the window."""
    # whatever part of the row they come from, the keys' positions go up to the block's last by one
    keys = torch.arange(blocks.width, device=device)
    queries = keys[blocks.width - blocks.length :, None]
    return (keys > queries) | (queries - keys >= window)
