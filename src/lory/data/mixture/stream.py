"""Streams: data that are larger than memory or disk, a window at a time.

A window is a number of conversations that are read, encoded, packed and shuffled together, as a whole set is that is
not streamed. So a stream that fits into one window gives the same steps as the set, and a run that is resumed reads its
window again and goes on inside of it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory.data.encoding.cache import find_rules
from lory.data.encoding.encode import Encoder
from lory.data.encoding.samples import Samples, count_up
from lory.data.encoding.store import Store, Summary, Writer, digest_question
from lory.data.encoding.workers import encode_all
from lory.data.mixture.split import HELD_OUT, scatter
from lory.data.sources.read import SourceConfig, SourceReader, open_source
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
        lost: for each of them, what was left out after reading, by reason.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: Encoder,
        window: int,
        weighted: bool,
        seed: int,
        workers: int | None = None,
        held_out: Collection[bytes] = (),
    ) -> None:
        """Nothing is read yet.

        Args:
            window: conversations of a window.
            weighted: mix by the weights until the first source has no more.
            held_out: questions (see `digest_question`) that are kept for evaluation.
        """
        self.sources, self.encoder, self.size, self.held_out = sources, encoder, window, held_out
        self.weights = [source.weight or 1.0 for source in sources] if weighted else None
        self.seed, self.workers = seed, workers
        self.readers: list[SourceReader] = []
        self.lost: list[Counter[str]] = []
        self._owners: list[int] = []
        self._open: tuple[tuple[int, ...], Iterator[Conversation]] | None = None
        self._last: tuple[tuple[int, ...], Window] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def read(self, starts: tuple[int, ...] = ()) -> Window:
        """The window that starts at these records of the sources; none: at the beginning.

        The window before is gone then. One in which nothing is learnt is passed over.

        Raises:
            UsageError: bad data; the sentence names file and line.
        """
        starts = tuple(starts) or (0,) * len(self.sources)
        if self._last and self._last[0] == starts:
            return self._last[1]
        if self._open is None or self._open[0] != starts:
            self._open = (starts, self._mix(starts))
        conversations = self._open[1]
        while True:
            store = self._encode(conversations)
            samples = _gather(store)
            if samples.supervised.any() or len(store.first) < self.size:
                break
        ends = tuple(reader.position for reader in self.readers)
        self._open, self._last = (ends, conversations), (starts, Window(samples, ends))
        return self._last[1]

    def _encode(self, conversations: Iterator[Conversation]) -> Store:
        # on Windows, files that are still mapped cannot be deleted; the system's own cleaning gets them
        folder = tempfile.TemporaryDirectory(prefix="lory-window-", ignore_cleanup_errors=True)
        self._owners.clear()
        with Writer(Path(folder.name)) as writer:
            encode_all(itertools.islice(conversations, self.size), self.encoder, writer, self.workers)
            writer.finish(Summary())
        store = Store(Path(folder.name))
        for owner, reason in zip(self._owners, store.reasons(), strict=True):
            if reason:
                self.lost[owner][reason] += 1
        if self._folder:
            self._folder.cleanup()
        self._folder = folder
        return store

    def report(self) -> list[dict[str, Any]]:
        """data.json's part on the sources: what was read of each so far."""
        return [
            {
                "name": reader.name,
                "path": reader.config.path,
                "streamed": True,
                "read_so_far": reader.read,
                "dropped": dict(reader.dropped + lost),
                "notes": reader.notes if reader.read else [],
            }
            for reader, lost in zip(self.readers, self.lost, strict=True)
        ]

    def _mix(self, starts: tuple[int, ...]) -> Iterator[Conversation]:
        self.readers = [open_source(source, start) for source, start in zip(self.sources, starts, strict=True)]
        self.encoder = self.encoder.with_rules(find_rules(self.readers, self.encoder.rules))
        self.lost = [Counter() for _ in self.readers]
        for owner, conversation in self._choose():
            if self.held_out and digest_question(conversation) in self.held_out:
                self.lost[owner][HELD_OUT] += 1
                continue
            self._owners.append(owner)
            yield conversation

    def _choose(self) -> Iterator[tuple[int, Conversation]]:
        """Each conversation with the number of its source."""
        if self.weights is None:
            for number, reader in enumerate(self.readers):
                yield from ((number, conversation) for conversation in reader)
            return
        iterators = [iter(reader) for reader in self.readers]
        while True:
            # drawn from how far the sources were read, so that a resumed stream draws the same
            number = self._draw()
            conversation = next(iterators[number], None)
            if conversation is None:
                return
            yield number, conversation

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
