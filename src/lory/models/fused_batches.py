"""Attention of short documents, many in one call: where each is small, calls take longer than what they compute.

Documents of about the same length are padded to the longest of them. Padding comes last, so that causal attention
never looks there.

Shapes: T tokens of a row, N heads, G heads of keys and values, D numbers of a head; n documents of L tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lory.models.fused_ops import attend_plainly_back, score

# How many places a batch has for a token at most, and how many tokens, since all its scores are in memory at a time
_MOST_PADDING, _MOST_TOKENS = 1.25, 4096


class Batch(NamedTuple):
    """Documents that are attended to together."""

    documents: int
    length: int
    source: Tensor
    """(n * L) which token of the row stands in each place; in padding, the document's last."""
    places: Tensor
    """(tokens) those that are no padding, ..."""
    tokens: Tensor
    """(tokens) ... and what stands there."""
    padding: Tensor
    """(n * L - tokens) the other places."""
    bias: Tensor
    """Minus infinity where a query does not look, else zero: causal (L, L), else (n, 1, L)."""


def group_documents(documents: Sequence[tuple[int, int]], causal: bool) -> tuple[Batch, ...]:
    """Batches of documents, given by where each begins and ends in the row."""
    batches: list[list[tuple[int, int]]] = []
    longest = tokens = 0
    for start, end in sorted(documents, key=lambda ends: ends[0] - ends[1]):
        tokens += end - start
        places = longest * (len(batches[-1]) + 1) if batches else 0
        if not batches or places > min(_MOST_PADDING * tokens, _MOST_TOKENS):
            batches.append([])
            longest = tokens = end - start
        batches[-1].append((start, end))
    return tuple(_lay_out(batch, causal) for batch in batches)


def _lay_out(documents: Sequence[tuple[int, int]], causal: bool) -> Batch:
    first, last = torch.tensor(documents).t()[..., None]
    steps = torch.arange(int((last - first).max()))
    source = torch.minimum(first + steps, last - 1).flatten()
    real = (steps < last - first).flatten()
    hidden = steps > steps[:, None] if causal else ~real.view(len(documents), 1, -1)
    places = real.nonzero()[:, 0]
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return Batch(len(documents), len(steps), source, places, source[places], (~real).nonzero()[:, 0], bias)


def attend_together(q: Tensor, k: Tensor, v: Tensor, out: Tensor, batch: Batch, scaling: float) -> None:
    """Write the attention of a batch's tokens into `out`; q and out (T, N, D), k and v (T, G, D)."""
    groups = k.shape[1]
    weights = _weigh(_take(q, batch, groups), _take(k, batch, groups), batch, scaling)
    _put(torch.bmm(weights, _take(v, batch, groups)), out, batch)


def attend_back_together(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    batch: Batch,
    scaling: float,
) -> None:
    """Write the gradients of a batch's q, k and v into `gradients`, which are shaped like them; grad is (T, N, D)."""
    groups = k.shape[1]
    queries, keys, values = (_take(x, batch, groups) for x in (q, k, v))
    # what arrives in padding would be the last token's once more
    arriving = _take(grad, batch, groups, blank=True)
    weights = _weigh(queries, keys, batch, scaling)
    parts = attend_plainly_back(arriving, queries, keys, values, weights, scaling)
    for part, places in zip(parts, gradients, strict=True):
        _put(part, places, batch)


def _take(x: Tensor, batch: Batch, groups: int, blank: bool = False) -> Tensor:
    """A batch's tokens out of (T, heads, D): (n * G, L * heads / G, D), a head's row below the other's of its token."""
    taken = x.index_select(0, batch.source)
    if blank:
        taken.index_fill_(0, batch.padding, 0)
    shaped = taken.view(batch.documents, batch.length, groups, -1, x.shape[-1])
    return shaped.transpose(1, 2).reshape(batch.documents * groups, -1, x.shape[-1])


def _put(part: Tensor, places: Tensor, batch: Batch) -> None:
    """Write what `_take` would have taken from `places` (T, heads, D); padding goes nowhere."""
    heads, head_dim = places.shape[1:]
    by_token = part.view(batch.documents, -1, batch.length, heads * batch.documents // len(part), head_dim)
    flat = by_token.transpose(1, 2).reshape(-1, heads, head_dim)
    places.index_copy_(0, batch.tokens, flat.index_select(0, batch.places))


def _weigh(queries: Tensor, keys: Tensor, batch: Batch, scaling: float) -> Tensor:
    """The probabilities (n * G, L * N / G, L) of queries (n * G, L * N / G, D)."""
    scores = score(queries, keys, scaling)
    if batch.bias.dim() == 2:
        scores.view(len(scores), batch.length, -1, batch.length).add_(batch.bias[:, None])
    elif len(batch.padding):
        scores.view(batch.documents, -1, batch.length).add_(batch.bias)
    return torch.softmax(scores, -1).to(queries.dtype)
