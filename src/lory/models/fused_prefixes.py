"""Documents of a row that begin alike: what they share is computed once.

With causal attention a token's state depends on what stands before it in its document, so documents that begin with the
same tokens (a system prompt, a template's head, one text with several questions) have the same states there. A row
holds them once, in the first document that has them; the others keep what follows, and look at both. That is exact:
the gradient of a shared state is the sum over all that use it.
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


class SharedRow(NamedTuple):
    """A row without what its documents have in common with others."""

    kept: Tensor
    """(C) which of the T tokens are computed, document by document."""
    positions: Tensor
    """(C) their positions in their documents."""
    places: Tensor
    """(T) where among the C the state of each token is."""
    borders: tuple[int, ...]
    """(documents + 1) from 0 to C: the documents' own tokens."""
    before: tuple[Path, ...]
    """(documents) where among the C the tokens before a document's own are."""


def share_prefixes(input_ids: Tensor, lengths: Sequence[int]) -> SharedRow | None:
    """The row of documents that begin alike; None where no two do.

    Sorted, each document has the longest beginning that it shares with any before it in common with its neighbour.

    Args:
        input_ids: (T), on the CPU.
        lengths: of the documents.
    """
    ids = input_ids.tolist()
    starts = [0, *itertools.accumulate(lengths)]
    documents = [ids[start:end] for start, end in itertools.pairwise(starts)]
    paths: list[Path] = [()] * len(documents)
    kept, positions, borders, before = [], [], [0], []
    previous: int | None = None
    for number in sorted(range(len(documents)), key=documents.__getitem__):
        common = 0 if previous is None else _count_common(documents[previous], documents[number])
        prefix = () if previous is None or common < LEAST_TOKENS else cut(paths[previous], 0, common)
        common = sum(run.length for run in prefix)
        own = Run(borders[-1], lengths[number] - common)
        paths[number] = (*prefix, own) if own.length else prefix
        before.append(prefix)
        borders.append(own.start + own.length)
        kept.append(torch.arange(starts[number] + common, starts[number + 1]))
        positions.append(torch.arange(common, lengths[number]))
        previous = number
    if borders[-1] == len(ids):
        return None
    places = torch.cat([torch.arange(start, start + length) for path in paths for start, length in path])
    return SharedRow(torch.cat(kept), torch.cat(positions), places, tuple(borders), tuple(before))


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
