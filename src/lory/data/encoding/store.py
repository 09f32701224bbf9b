"""Encoded samples on disk: written chunk by chunk, read through a memory map, so that no set is too large for memory.

A store is a folder of three Arrow files. `samples.arrow` has a row a sample; `conversations.arrow` a row a
conversation, which says which samples are its own; `images.arrow` a row an image: its place, not its pixels. Equal
conversations share their samples, so a record that is repeated ten thousand times is encoded and stored once.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lory.data.encoding.arrow_table import Table, read_table
from lory.data.encoding.image_table import ImageTable, ImageWriter
from lory.runtime import LoryError, read_json, write_json
from lory.types import IGNORE, Conversation, Sample

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

SAMPLES, CONVERSATIONS, SUMMARY = "samples.arrow", "conversations.arrow", "summary.json"
_INSIDE = "\x00"
"""Stands in a stored place for what the source is called."""
_ROWS = 1024
"""In a batch of a file."""
_REMEMBERED = 100_000
"""How many conversations are remembered, to find equal ones before they are encoded."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of one conversation: its samples, or the reason why it has none."""

    samples: tuple[Sample, ...]
    dropped: str = ""
    broken: str = ""
    """The path of the image for which it was dropped."""


@dataclass
class Summary:
    """What is known of a source once all of its records have passed."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    """SHA-256 of the content that was read."""
    vocabulary: str = ""
    """SHA-256 of the tokenizer and its template, which give the tokens their meaning."""


def digest_conversation(conversation: Conversation) -> bytes:
    """16 bytes that equal conversations share, wherever they were read."""
    parts = (
        conversation.messages,
        conversation.text,
        conversation.text_pair,
        conversation.tools,
        conversation.rejected,
        conversation.label,
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def digest_question(conversation: Conversation) -> bytes:
    """8 bytes of what identifies a conversation for the split: its first question.

    Conversations that begin alike stay on one side, since each of their answers is learnt.
    """
    first = next((message for message in conversation.messages if message.role == "user"), None)
    asked = (first.content, first.media) if first is not None else (conversation.text, conversation.text_pair)
    # nearly all are one plain text
    whole = repr(asked) if asked[1] else asked[0] or ""
    return hashlib.blake2b(whole.encode(), digest_size=8).digest()


class Writer:
    """Fills a store with conversations in their order. A conversation that was met before needs no encoding."""

    def __init__(self, folder: Path, origin: str = "") -> None:
        """`folder` exists and is empty; `origin`: what the places of all conversations begin with."""
        import pyarrow

        self.folder, self.origin = folder, origin
        self._images = ImageWriter(folder)
        self._samples = Table(
            folder / SAMPLES,
            pyarrow.schema(
                [
                    ("input_ids", pyarrow.list_(pyarrow.int32())),
                    # the learnt stretches: start, end (exclusive), start, end, ...
                    ("spans", pyarrow.list_(pyarrow.int32())),
                    # a weight for each stretch; none when all are 1
                    ("weights", pyarrow.list_(pyarrow.float32())),
                    # numbers in the table of images
                    ("images", pyarrow.list_(pyarrow.int32())),
                ]
            ),
            _ROWS,
        )
        self._conversations = Table(
            folder / CONVERSATIONS,
            pyarrow.schema(
                [
                    ("digest", pyarrow.binary(16)),
                    ("question", pyarrow.binary(8)),
                    ("first", pyarrow.int64()),
                    ("count", pyarrow.int32()),
                    ("where", pyarrow.string()),
                    ("dropped", pyarrow.string()),
                ]
            ),
            _ROWS,
        )
        self._known: OrderedDict[bytes, tuple[int, int, str]] = OrderedDict()
        self._next = 0
        self.dropped: Counter[str] = Counter()
        """Conversations without a sample, by reason."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._samples.close()
        self._conversations.close()
        self._images.close()

    def knows(self, digest: bytes) -> bool:
        """Whether an equal conversation is stored already, as far as that is remembered."""
        return digest in self._known

    def add(self, conversation: Conversation, digest: bytes, encoded: Encoded | None) -> None:
        """Append a conversation; `encoded` is None for a known one."""
        if encoded is not None:
            self._known[digest] = (self._next, len(encoded.samples), encoded.dropped)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            for sample in encoded.samples:
                spans, weights = _find_spans(sample)
                self._samples.append((sample.input_ids, spans, weights, self._images.add(sample.images)))
            if encoded.broken:
                self._images.add_broken(encoded.broken)
            self._next += len(encoded.samples)
        first, count, dropped = self._known[digest]
        question, where = digest_question(conversation), conversation.where
        # without the source's own name, so that a renamed one finds its places
        inside = bool(self.origin) and where.startswith(self.origin)
        where = _INSIDE + where[len(self.origin) :] if inside else where
        self._conversations.append((digest, question, first, count, where, dropped or None))
        if dropped:
            self.dropped[dropped] += 1

    def finish(self, summary: Summary) -> None:
        """Write the summary last: a store without one is not whole."""
        self._close()
        values = {**vars(summary), "dropped": dict(summary.dropped)}
        write_json(self.folder / SUMMARY, values)


def _find_spans(sample: Sample) -> tuple[list[int], list[float]]:
    """The learnt stretches of one weight each: their borders, and the weights unless all are 1."""
    import numpy as np

    learnt = np.array(sample.labels) != IGNORE
    values = learnt.astype(np.float32) if sample.weights is None else np.where(learnt, sample.weights, 0)
    # a weight of 0 parts nothing: what does not count is not learnt
    framed = np.zeros(len(values) + 2, dtype=np.float32)
    framed[1:-1] = values
    changes = np.flatnonzero(framed[1:] != framed[:-1])
    starts = [int(place) for place in changes if place < len(values) and values[place]]
    ends = [int(place) for place in changes if place and values[place - 1]]
    spans = [border for pair in zip(starts, ends, strict=True) for border in pair]
    return spans, [] if sample.weights is None else [float(values[start]) for start in starts]


class Store:
    """A finished store. Arrays have one entry a sample or a conversation; samples are made when they are asked for."""

    def __init__(self, folder: Path, origin: str = "") -> None:
        """`origin`: what the source is called now; raises `LoryError` when the store is not whole."""
        import pyarrow

        try:
            values = read_json(folder / SUMMARY)
            self.summary = Summary(**{**values, "dropped": Counter(values["dropped"])})
            self._samples = read_table(folder / SAMPLES)
            self._conversations = read_table(folder / CONVERSATIONS)
            self.images = ImageTable(folder)
        except (OSError, pyarrow.ArrowException, KeyError, TypeError) as error:
            raise LoryError(f"{folder} is no whole store of samples: {error}.") from error
        self.folder, self.origin = folder, origin
        self._measure()

    def _measure(self) -> None:
        import numpy as np

        lengths, supervised, seen, starts = [], [], [], [0]
        for batch in self._batches():
            ids, spans = batch.column("input_ids"), batch.column("spans")
            lengths.append(np.diff(ids.offsets))
            borders, ends = np.asarray(spans.values), np.asarray(spans.offsets)
            # the first token of a sample has nothing before it to be predicted from
            learnt = np.concatenate([[0], np.cumsum(borders[1::2] - np.maximum(borders[::2], 1))])
            supervised.append(np.diff(learnt[ends // 2]))
            seen.append(np.diff(batch.column("images").offsets))
            starts.append(starts[-1] + len(ids))
        empty = np.zeros(0, dtype=np.int64)
        self.lengths: np.ndarray[Any, Any] = np.concatenate([empty, *lengths])
        self.supervised: np.ndarray[Any, Any] = np.concatenate([empty, *supervised])
        self.image_counts: np.ndarray[Any, Any] = np.concatenate([empty, *seen])
        self._starts = starts
        self.first = self._column("first")
        self.count = self._column("count")
        self.digests = self._hashes("digest", 16)
        self.questions = self._hashes("question", 8)[:, 0]

    def _batches(self) -> Iterable[pyarrow.RecordBatch]:
        return (self._samples.get_batch(number) for number in range(self._samples.num_record_batches))

    def _column(self, name: str) -> np.ndarray[Any, Any]:
        import numpy as np

        found = self._conversations.read_all().column(name)
        return np.asarray(found, dtype=np.int64)

    def _hashes(self, name: str, width: int) -> np.ndarray[Any, Any]:
        """(conversations, width / 8) unsigned integers of a binary column."""
        import numpy as np

        words = [
            np.frombuffer(chunk.buffers()[1], dtype=np.uint64)[
                chunk.offset * width // 8 : (chunk.offset + len(chunk)) * width // 8
            ]
            for chunk in self._conversations.read_all().column(name).chunks
        ]
        return np.concatenate([np.zeros(0, dtype=np.uint64), *words]).reshape(-1, width // 8)

    def __len__(self) -> int:
        """How many samples are stored."""
        return self._starts[-1]

    def sample(self, index: int) -> Sample:
        """A sample by its number."""
        batch, row = divmod(index, _ROWS)
        columns = self._samples.get_batch(batch)
        ids: tuple[int, ...] = tuple(columns.column("input_ids")[row].values.to_pylist())
        spans: list[int] = columns.column("spans")[row].values.to_pylist()
        given: list[float] = columns.column("weights")[row].values.to_pylist()
        labels = [IGNORE] * len(ids)
        weights = [0.0] * len(ids) if given else None
        for number, (start, end) in enumerate(zip(spans[::2], spans[1::2], strict=True)):
            labels[start:end] = ids[start:end]
            if weights is not None:
                weights[start:end] = [given[number]] * (end - start)
        images = tuple(self.images[number] for number in columns.column("images")[row].values.to_pylist())
        return Sample(ids, tuple(labels), None if weights is None else tuple(weights), images)

    def ids(self, indices: np.ndarray[Any, Any]) -> Iterator[list[np.ndarray[Any, Any]]]:
        """Token ids of some samples (ascending numbers), a list of arrays for each stretch of the file."""
        import numpy as np

        for number in range(self._samples.num_record_batches):
            first, last = np.searchsorted(indices, [number * _ROWS, (number + 1) * _ROWS])
            if first == last:
                continue
            column = self._samples.get_batch(number).column("input_ids")
            values, offsets = np.asarray(column.values), np.asarray(column.offsets)
            rows = indices[first:last] - number * _ROWS
            yield [values[offsets[row] : offsets[row + 1]] for row in rows.tolist()]

    def reasons(self) -> list[str | None]:
        """Why each conversation has no sample; None where it has."""
        found: list[str | None] = self._conversations.read_all().column("dropped").to_pylist()
        return found

    def place(self, conversation: int) -> str:
        """Where a conversation was read."""
        batch, row = divmod(conversation, _ROWS)
        where = str(self._conversations.get_batch(batch).column("where")[row].as_py())
        return self.origin + where[1:] if where.startswith(_INSIDE) else where
