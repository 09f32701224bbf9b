"""Packing: which samples share a row."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int], np.dtype[np.int64]]


class Rows(Sequence[list[int]]):
    """Rows of sample indices, kept in two arrays: a list of lists takes ten times the memory."""

    def __init__(self, indices: Array, ends: Array) -> None:
        """`indices`: (samples) of all rows, one after the other; `ends`: (rows) where each row ends in them."""
        self.indices, self.ends = indices, ends

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[int]]) -> Rows:
        """Rows given as lists."""
        import numpy as np

        kept = list(rows)
        flat = np.fromiter((index for row in kept for index in row), dtype=np.int64)
        return cls(flat, np.cumsum([len(row) for row in kept], dtype=np.int64))

    @classmethod
    def one_each(cls, indices: Array) -> Rows:
        """A row for each sample."""
        import numpy as np

        return cls(indices, np.arange(1, len(indices) + 1))

    def take(self, indices: Array) -> Rows:
        """The same rows for `indices[i]` in place of `i`."""
        return Rows(indices[self.indices], self.ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        start = int(self.ends[row - 1]) if row else 0
        found: list[int] = self.indices[start : int(self.ends[row])].tolist()
        return found

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def pack(lengths: Sequence[int] | Array, capacity: int) -> Rows:
    """Best-fit decreasing bin packing: the longest sample first, each into the fullest row that still holds it.

    Args:
        lengths: token counts, none above `capacity`.

    Returns:
        Rows of indices into `lengths`, each row's lengths adding up to at most `capacity`.
    """
    import numpy as np

    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"a sample of {sizes.max()} tokens does not fit into rows of {capacity}")
    order = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), dtype=np.int64)
    # rows by how many tokens are free in them, and a bit for every such number that has a row: the fullest row that
    # holds a sample is the lowest bit from its length on (of equally full ones the oldest)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    bits = rows = 0
    for index, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = bits >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(open_rows[free])
            if not open_rows[free]:
                bits ^= 1 << free
        else:
            free, row = capacity, rows
            rows += 1
        row_of[index] = row
        if free > length:
            heapq.heappush(open_rows[free - length], row)
            bits |= 1 << (free - length)
    # a row's samples in the order in which they were put there: by row, then by place in the order
    indices = order[np.argsort(row_of[order], kind="stable")]
    return Rows(indices, np.cumsum(np.bincount(row_of, minlength=rows)))


def efficiency(tokens: int, rows: int, capacity: int) -> float:
    """The share of the rows' capacity that holds tokens."""
    return tokens / (capacity * rows) if rows else 0.0
