"""Duplicates: conversations that are there twice, and evaluation samples that training has nearly seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Duplicates = Literal["fold", "keep", "drop"]

SHINGLE = 8
"""Tokens of a stretch that counts as taken over."""
NEAR = 0.8
"""Share of a sample's stretches that stand in training, from which on it counts as a near duplicate."""


def find_first(digests: Array) -> Array:
    """For each of (n, 2) digests the number of the first equal one."""
    import numpy as np

    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ordered = digests[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1] if len(order) else order
    return first


def find_near_duplicates(train: Iterable[Array], evaluation: Sequence[Iterable[Array]]) -> list[int]:
    """How many evaluation samples are nearly trained on: at least `NEAR` of their 8-token stretches stand in training.

    (Containment of shingles: Broder 1997, On the resemblance and containment of documents.) Stretches that many
    evaluation samples share, such as a system prompt and the template's marks, are left aside.

    Args:
        train: (tokens) ids of training samples, many of them one after the other in each array.
        evaluation: for each evaluation set, (tokens) ids of each of its samples.

    Returns:
        For each evaluation set, the number of such samples.
    """
    import numpy as np

    own = [[np.unique(_hash_shingles(ids)) for ids in samples] for samples in evaluation]
    flat = [hashes for samples in own for hashes in samples]
    if not flat:
        return [0] * len(own)
    wanted, counts = np.unique(np.concatenate(flat), return_counts=True)
    wanted = wanted[counts <= max(2, len(flat) // 50)]
    seen = _mark_seen(train, wanted)
    return [sum(_is_near(hashes, wanted, seen) for hashes in samples) for samples in own]


def _is_near(hashes: Array, wanted: Array, seen: Array) -> bool:
    import numpy as np

    places = np.searchsorted(wanted, hashes)
    inside = places < len(wanted)
    places = places[inside][wanted[places[inside]] == hashes[inside]]
    # of very short samples nothing can be said
    return len(places) >= SHINGLE and bool(seen[places].mean() >= NEAR)


def _mark_seen(train: Iterable[Array], wanted: Array) -> Array:
    """(wanted) whether each hash occurs in training."""
    import numpy as np

    seen = np.zeros(len(wanted), dtype=bool)
    # nearly all of the training's hashes are turned away by one look into a table
    table = np.zeros(1 << 22, dtype=bool)
    table[wanted >> np.uint64(42)] = True
    for ids in train:
        hashes = _hash_shingles(ids)
        hashes = hashes[table[hashes >> np.uint64(42)]]
        places = np.minimum(np.searchsorted(wanted, hashes), max(len(wanted) - 1, 0))
        if len(wanted):
            seen[places[wanted[places] == hashes]] = True
    return seen


def _hash_shingles(ids: Array) -> Array:
    """(tokens - 7) a hash of each stretch of 8 tokens."""
    import numpy as np

    count = max(len(ids) - SHINGLE + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count].astype(np.uint64) + np.uint64(1)
        hashes ^= hashes >> np.uint64(29)
    return hashes
