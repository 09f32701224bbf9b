"""Streams: data that are larger than memory or disk, a window at a time.

A window is a number of conversations that are read, encoded, packed and shuffled together, as a whole set is that is
not streamed. So a stream that fits into one window gives the same steps as the set, and a run that is resumed reads its
window again and goes on inside of it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory.data.encode import Encoder
from lory.data.samples import Samples, count_up
from lory.data.sources import SourceConfig, SourceReader, open_source
from lory.data.split import scatter
from lory.data.store import Store, Summary, Writer
from lory.data.workers import encode_all
from lory.types import Conversation


@dataclass(frozen=True)
class Window:
    """Samples that are learnt together."""

    samples: Samples
    """Empty at the end of the stream."""
    ends: tuple[int, ...]
    """For each source, the record at which the next window starts."""


class Stream:
    """Windows of the sources' conversations, in an order that depends on sources and seed alone.

    Attributes:
        readers: what was read since the last start, for reports.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: Encoder,
        window: int,
        weighted: bool,
        seed: int,
        workers: int | None = None,
    ) -> None:
        """`window`: conversations of a window; `weighted`: mix by the weights until the first source has no more."""
        self.sources, self.encoder, self.size = sources, encoder, window
        self.weights = [source.weight or 1.0 for source in sources] if weighted else None
        self.seed, self.workers = seed, workers
        self.readers: list[SourceReader] = []
        self._open: tuple[tuple[int, ...], Iterator[Conversation]] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def read(self, starts: tuple[int, ...] = ()) -> Window:
        """The window that starts at these records of the sources; none: at the beginning.

        The window before is gone then.

        Raises:
            UsageError: bad data; the sentence names file and line.
        """
        starts = starts or (0,) * len(self.sources)
        if self._open is None or self._open[0] != starts:
            self._open = (starts, self._mix(starts))
        conversations = self._open[1]
        folder = tempfile.TemporaryDirectory(prefix="lory-window-")
        with Writer(Path(folder.name)) as writer:
            encode_all(itertools.islice(conversations, self.size), self.encoder, writer, self.workers)
            writer.finish(Summary())
        ends = tuple(reader.position for reader in self.readers)
        self._open = (ends, conversations)
        samples = _gather(Store(Path(folder.name)))
        if self._folder:
            self._folder.cleanup()
        self._folder = folder
        return Window(samples, ends)

    def report(self) -> list[dict[str, Any]]:
        """data.json's part on the sources: what was read of each so far."""
        return [
            {
                "name": reader.name,
                "path": reader.config.path,
                "streamed": True,
                "read_so_far": reader.read,
                "dropped": dict(reader.dropped),
                "notes": reader.notes if reader.read else [],
            }
            for reader in self.readers
        ]

    def _mix(self, starts: tuple[int, ...]) -> Iterator[Conversation]:
        self.readers = [open_source(source, start) for source, start in zip(self.sources, starts, strict=True)]
        if self.weights is None:
            for reader in self.readers:
                yield from reader
            return
        iterators = [iter(reader) for reader in self.readers]
        while True:
            # drawn from how far the sources were read, so that a resumed stream draws the same
            number = self._draw()
            conversation = next(iterators[number], None)
            if conversation is None:
                return
            yield conversation

    def _draw(self) -> int:
        import numpy as np

        assert self.weights is not None
        place = np.array([sum(reader.position for reader in self.readers)], dtype=np.uint64)
        share = float(scatter(place, self.seed)[0]) / 2**64 * sum(self.weights)
        for number, weight in enumerate(self.weights):
            share -= weight
            if share < 0:
                return number
        return len(self.weights) - 1


def _gather(store: Store) -> Samples:
    """All samples of a window, those of equal conversations as often as they are there."""
    import numpy as np

    indices = count_up(store.first, store.count)
    return Samples([store], np.zeros(len(indices), dtype=np.int64), indices)
