"""Rows: what every kind of source gives before anybody asks what a record means."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be a record, although the file around it is sound, such as one with a cell too many."""

    problem: str
    """Goes on from the row's place: "has 3 cells, but the header has 2"."""


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A sound row that is not to be learnt from, such as an answer that is marked as one to avoid."""

    reason: str


Row = tuple[str, Any]
"""Where a row was read (file and line, row or number), and its value: an object, one of these two, or other JSON."""


class Rows(ABC):
    """Rows in a fixed order, which can be read again and from any row on."""

    name: str
    """What errors call them."""
    folder: str = ""
    """Where paths of images, sounds and videos in the rows start from; empty: the working directory."""
    reading: str = ""
    """How the content is read, as far as the files' names decide that: the same bytes may be JSON lines or text."""

    @abstractmethod
    def read(self, start: int = 0) -> Iterator[Row]:
        """The rows from number `start` on (0 is the first)."""

    @abstractmethod
    def count(self) -> int:
        """How many rows there are; it may take a pass over all of them."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the content, whatever it is called."""


@dataclass(frozen=True)
class MadeRows(Rows):
    """Rows that are made on the spot, such as those of `identity`."""

    name: str
    make: Callable[[], Sequence[Row]]
    digest: Callable[[], str]

    def read(self, start: int = 0) -> Iterator[Row]:
        return iter(self.make()[start:])

    def count(self) -> int:
        return len(self.make())

    def fingerprint(self) -> str:
        return self.digest()


@dataclass(frozen=True)
class SlicedRows(Rows):
    """The rows from `first` up to `last` (not included) of others; None is the end."""

    inner: Rows
    first: int
    last: int | None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def folder(self) -> str:  # type: ignore[override]
        return self.inner.folder

    @property
    def reading(self) -> str:  # type: ignore[override]
        return self.inner.reading

    def read(self, start: int = 0) -> Iterator[Row]:
        begin = self.first + start
        if self.last is None:
            return self.inner.read(begin)
        return itertools.islice(self.inner.read(begin), max(0, self.last - begin))

    def count(self) -> int:
        total = self.inner.count()
        last = total if self.last is None else min(self.last, total)
        return max(0, last - self.first)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


@dataclass(frozen=True)
class JoinedRows(Rows):
    """One source after the other."""

    name: str
    parts: Sequence[Rows]

    @property
    def folder(self) -> str:  # type: ignore[override]
        return self.parts[0].folder

    @property
    def reading(self) -> str:  # type: ignore[override]
        return "+".join(part.reading for part in self.parts)

    def read(self, start: int = 0) -> Iterator[Row]:
        for part in self.parts:
            if start and start >= (count := part.count()):
                start -= count
                continue
            yield from part.read(start)
            start = 0

    def count(self) -> int:
        return sum(part.count() for part in self.parts)

    def fingerprint(self) -> str:
        return combine_fingerprints([part.fingerprint() for part in self.parts])


def combine_fingerprints(fingerprints: Sequence[str]) -> str:
    """One fingerprint for several contents in their order, which slices go by; a single one stays itself."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
