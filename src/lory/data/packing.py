"""Packing: which samples share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: the longest sample first, each into the fullest row that still holds it.

    Args:
        lengths: token counts, none above `capacity`.

    Returns:
        Rows of indices into `lengths`, each row's lengths adding up to at most `capacity`.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a sample of {length} tokens does not fit into rows of {capacity}")
        at = bisect_left(spaces, (length, -1))
        if at < len(spaces):
            free, row = spaces.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length:
            insort(spaces, (free - length, row))
    return rows


def efficiency(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """The share of the rows' capacity that holds tokens."""
    return sum(lengths) / (capacity * len(rows)) if rows else 0.0
