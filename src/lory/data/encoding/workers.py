"""Encoding in several processes: whatever their number, the same conversations come out in the same order."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from lory.data.encoding.encode import Encoder
from lory.data.encoding.store import Encoded, Writer, digest_conversation
from lory.runtime import LoryError
from lory.types import Conversation

_CHUNK = 256
"""Conversations that are encoded together."""
_WORTH_PROCESSES = 8_000
"""How many conversations one process encodes before others are started for the rest: starting costs seconds."""

Item = tuple[Conversation, bytes, bool]
"""A conversation, its digest, and whether it has to be encoded."""


def encode_all(conversations: Iterable[Conversation], encoder: Encoder, writer: Writer, workers: int | None) -> None:
    """Encode conversations into a store, in their order; one that is stored already is not encoded again.

    Args:
        workers: processes that encode; None: one for each core, once there is enough to do.

    Raises:
        UsageError: a conversation cannot be encoded.
        LoryError: a process was killed.
    """
    with _Encoders(encoder, workers) as encoders:
        waiting: collections.deque[tuple[list[Item], Future[_Result]]] = collections.deque()
        for items in _chunks(conversations, writer):
            waiting.append((items, encoders.submit([conversation for conversation, _, new in items if new])))
            while len(waiting) > encoders.ahead:
                _write(*waiting.popleft(), encoder, writer)
        while waiting:
            _write(*waiting.popleft(), encoder, writer)


def _chunks(conversations: Iterable[Conversation], writer: Writer) -> Iterator[list[Item]]:
    """Runs of conversations with at most `_CHUNK` that have to be encoded."""
    items: list[Item] = []
    under_way: set[bytes] = set()
    for conversation in conversations:
        digest = digest_conversation(conversation)
        new = digest not in under_way and not writer.knows(digest)
        if new:
            under_way.add(digest)
        items.append((conversation, digest, new))
        if len(under_way) == _CHUNK or len(items) == 16 * _CHUNK:
            yield items
            items, under_way = [], set()
    if items:
        yield items


_Result = tuple[list[Encoded], Counter[str]]
"""What became of a chunk's conversations, and the encoder's notes on them."""


def _write(items: list[Item], future: Future[_Result], encoder: Encoder, writer: Writer) -> None:
    try:
        encoded, notes = future.result()
    except BrokenProcessPool as error:
        raise LoryError(
            "A process that encodes data was killed, perhaps for want of memory; set data.workers to a lower number."
        ) from error
    encoder.notes.update(notes)
    results = iter(encoded)
    for conversation, digest, new in items:
        if new and writer.knows(digest):
            next(results)  # an equal one came in the chunk before, while this one was under way
        elif new:
            writer.add(conversation, digest, next(results))
            continue
        # it may have been forgotten since it was seen
        known = writer.knows(digest)
        writer.add(conversation, digest, None if known else encoder.encode(conversation))


class _Encoders:
    """One or several processes that encode chunks; it starts with this one."""

    def __init__(self, encoder: Encoder, workers: int | None) -> None:
        self.encoder = encoder
        # a copy of this process is there at once, where the system has such a thing
        self.method = "fork" if sys.platform == "linux" else "spawn"
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self.count = cores if workers is None else workers
        if encoder.reader is not None and self.method == "spawn":
            self.count = 1  # a processor's class cannot be sent to another process
        # images take a hundred times as long as texts
        patience = _WORTH_PROCESSES if encoder.reader is None else _WORTH_PROCESSES // 100
        self.patience = patience if workers is None else 0
        self.pool: Executor | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self._stack.close()

    @property
    def ahead(self) -> int:
        """How many chunks may be under way at once."""
        return 2 * self.count if self.pool is not None else 0

    def submit(self, conversations: Sequence[Conversation]) -> Future[_Result]:
        if self.pool is None and self.count > 1 and self.patience <= 0:
            self._stack.enter_context(_no_threads())
            context = multiprocessing.get_context(self.method)
            self.pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_keep, initargs=(self.encoder,))
        self.patience -= len(conversations)
        if self.pool is not None:
            return self.pool.submit(_encode_kept, conversations)
        done: Future[_Result] = Future()
        done.set_result(_encode(self.encoder, conversations))
        return done


@contextlib.contextmanager
def _no_threads() -> Iterator[None]:
    """Tokenizers leave their threads aside: the processes keep the cores busy, and threads do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _encode(encoder: Encoder, conversations: Sequence[Conversation]) -> _Result:
    """Encode conversations, with the notes on these alone."""
    encoder.notes, before = Counter(), encoder.notes
    try:
        return encoder.encode_all(conversations), encoder.notes
    finally:
        encoder.notes = before


_kept: list[Encoder] = []
"""In a worker process: its encoder."""


def _keep(encoder: Encoder) -> None:
    # Ctrl-C reaches every process; the one that is waited for ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _kept[:] = [encoder]


def _end_with_parent() -> None:
    """Otherwise the processes of one that was killed would wait for work for ever, and hold its locks."""
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_kept(conversations: Sequence[Conversation]) -> _Result:
    return _encode(_kept[0], conversations)
