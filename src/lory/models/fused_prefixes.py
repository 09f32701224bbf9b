"""What of a row has to be computed: what documents begin with alike only once, and nothing that no loss looks at.

With causal attention a token's state depends on what stands before it in its document, so documents that begin with the
same tokens (a system prompt, a template's head, one text with several questions) have the same states there. A row
holds them once, in the first document that has them; the others keep what follows, and look at both. That is exact:
the gradient of a shared state is the sum over all that use it. What stands behind the last token that is wanted of a
document (its terminator predicts nothing) has no part in anything, and other tokens that are not wanted have none in
the last layer but to be looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Fewer tokens are not worth that a document's keys come from several places
LEAST_TOKENS = 8


class Run(NamedTuple):
    """Tokens one after the other in a row."""

    start: int
    length: int


Path = tuple[Run, ...]


class CompactRow(NamedTuple):
    """The C of a row's T tokens that are computed."""

    kept: Tensor
    """(C) which they are, document by document."""
    positions: Tensor
    """(C) their positions in their documents."""
    borders: tuple[int, ...]
    """(documents + 1) from 0 to C: the documents' own tokens."""
    before: tuple[Path, ...]
    """(documents) where among the C the tokens before a document's own are."""
    last: Tensor | None
    """(W) which of the C the last layer gives states of; None: all."""
    places: Tensor
    """(T) where among those the state of each token is; of one that is not wanted it may be another's."""


def compact(input_ids: Tensor, lengths: Sequence[int], wanted: Tensor | None = None) -> CompactRow:
    """The row of documents without what need not be computed.

    Sorted, each document has the longest beginning that it shares with any before it in common with its neighbour.

    Args:
        input_ids: (T), on the CPU.
        lengths: of the documents.
        wanted: (T) whose states are looked at; None: all.
    """
    if wanted is not None and not wanted.any():
        wanted = None
    ids = input_ids.tolist()
    starts = [0, *itertools.accumulate(lengths)]
    used = lengths if wanted is None else [_reach(part) for part in wanted.split(list(lengths))]
    documents = [ids[start : start + length] for start, length in zip(starts, used, strict=False)]
    paths: list[Path] = [()] * len(documents)
    kept, positions, borders, before = [], [], [0], []
    previous: int | None = None
    for number in sorted(range(len(documents)), key=documents.__getitem__):
        common = 0 if previous is None else _count_common(documents[previous], documents[number])
        prefix = () if previous is None or common < LEAST_TOKENS else cut(paths[previous], 0, common)
        common = sum(run.length for run in prefix)
        own = Run(borders[-1], used[number] - common)
        paths[number] = (*prefix, own) if own.length else prefix
        before.append(prefix)
        borders.append(own.start + own.length)
        kept.append(torch.arange(starts[number] + common, starts[number] + used[number]))
        positions.append(torch.arange(common, used[number]))
        previous = number
    parts: list[Tensor] = []
    for path, length, reach in zip(paths, lengths, used, strict=True):
        parts += [torch.arange(run.start, run.start + run.length) for run in path]
        parts.append(torch.zeros(length - reach, dtype=torch.long))
    places = torch.cat(parts)
    last = None if wanted is None else places[wanted].unique()
    if last is not None:
        places = torch.zeros(borders[-1], dtype=torch.long).scatter_(0, last, torch.arange(len(last)))[places]
    return CompactRow(torch.cat(kept), torch.cat(positions), tuple(borders), tuple(before), last, places)


def _reach(wanted: Tensor) -> int:
    """How many tokens of a document there are up to the last one wanted; one at least."""
    found = wanted.nonzero()
    return int(found[-1]) + 1 if len(found) else 1


def cut(path: Path, first: int, last: int) -> Path:
    """The tokens of a path from its `first` up to, not including, its `last`."""
    runs, at = [], 0
    for start, length in path:
        begin, end = max(first - at, 0), min(last - at, length)
        if begin < end:
            runs.append(Run(start + begin, end - begin))
        at += length
    return tuple(runs)


def _count_common(left: Sequence[int], right: Sequence[int]) -> int:
    """With how many equal tokens two documents begin."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
