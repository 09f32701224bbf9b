"""Samples of several stores as one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from lory.data.encoding.store import Store
from lory.types import Sample

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Samples(Sequence[Sample]):
    """What a run learns from, or is evaluated on: samples are read from disk when they are asked for.

    Attributes:
        lengths: (samples) tokens of each.
        supervised: (samples) learnt tokens of each.
        image_counts: (samples) images of each.
    """

    def __init__(self, stores: Sequence[Store], sources: Array, indices: Array) -> None:
        """`sources`, `indices`: (samples) which store each sample is in, and its number there."""
        import numpy as np

        self.stores, self.sources, self.indices = stores, sources, indices
        self.lengths, self.supervised, self.image_counts = (np.zeros(len(indices), dtype=np.int64) for _ in range(3))
        for number, store in enumerate(stores):
            mine = sources == number
            self.lengths[mine] = store.lengths[indices[mine]]
            self.supervised[mine] = store.supervised[indices[mine]]
            self.image_counts[mine] = store.image_counts[indices[mine]]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.stores[self.sources[index]].sample(int(self.indices[index]))

    def identity(self, index: int) -> tuple[int, int]:
        """What two samples share if they are the same one."""
        return int(self.sources[index]), int(self.indices[index])

    def each_ids(self) -> Iterator[list[Array]]:
        """The token ids of every different sample, many at a time."""
        import numpy as np

        for number, store in enumerate(self.stores):
            yield from store.ids(np.unique(self.indices[self.sources == number]))


def count_up(starts: Array, counts: Array) -> Array:
    """``start, start + 1, ...``, as many numbers as `counts` says, for one start after the other."""
    import numpy as np

    before = np.repeat(np.cumsum(counts) - counts, counts)
    numbers: Array = np.repeat(starts, counts) + np.arange(len(before)) - before
    return numbers
