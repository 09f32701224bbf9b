"""What each optimizer step is fed with, by the run's position: a resumed run goes on with what would have come next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from lory.adapters.virtual_tokens import Leading
from lory.data.encoding.samples import Samples
from lory.data.mixture.collate import Batch
from lory.data.mixture.stream import Stream, Window
from lory.runtime import log
from lory.training.checkpoint import Position
from lory.training.plan import Plan, fold, make_batch, plan_rows
from lory.types import Sample

if TYPE_CHECKING:
    from lory.training.sight import Sight


class Feed(Protocol):
    """The training data, step by step."""

    total_steps: int

    def take(self, position: Position, rank: int) -> list[Batch]:
        """The micro-batches of a rank for the step that `position` stands before."""

    def samples(self, position: Position, rank: int) -> list[Sample]:
        """The samples of that step."""

    def advance(self, position: Position) -> None:
        """Move `position` behind that step."""

    def look_ahead(self, position: Position) -> Position | None:
        """What `position` will be after its step; None where that is not known, or is costly to find out."""


@dataclass(frozen=True)
class Batching:
    """How samples become batches."""

    padded: bool
    pad_id: int
    leading: Leading
    packing: bool
    max_tokens: int
    folding: bool

    def make(self, samples: Samples, plan: Plan, epoch: int, step: int, rank: int) -> list[Batch]:
        """The micro-batches of a step; equal samples are computed once, where that is wanted."""
        batches = plan.micro_batches(epoch, step, rank)
        counts = [Counter(batch) for batch in batches]
        if self.folding:
            row, leading = self.max_tokens + len(self.leading), len(self.leading)
            most = plan.batch_size * row if self.packing else sum(map(len, batches)) * row
            counts = fold(batches, samples, most, len(samples) if self.packing else plan.batch_size, leading)
            # ranks have to run the same number of passes, or they would wait for each other for ever
            if plan.processes > 1:
                counts += [Counter() for _ in range(len(batches) - len(counts))]
        return [make_batch(samples, count, self.padded, self.pad_id, self.leading) for count in counts]

    def evaluation(self, samples: Samples, rank: int, processes: int) -> Iterator[Batch]:
        """This rank's share of an evaluation set, a row at a time."""
        rows = plan_rows(samples, not self.padded, self.max_tokens, len(self.leading))
        # equal samples are never computed twice here: without dropout there is nothing to gain
        for counts in fold(rows[rank::processes], samples, 0, 0):
            if counts:
                yield make_batch(samples, counts, self.padded, self.pad_id, self.leading)


class SampleFeed:
    """A finite set of samples, in an order of its own in each epoch."""

    def __init__(self, samples: Samples, plan: Plan, batching: Batching, total_steps: int) -> None:
        self._samples, self.plan, self.batching, self.total_steps = samples, plan, batching, total_steps

    def take(self, position: Position, rank: int) -> list[Batch]:
        return self.batching.make(self._samples, self.plan, position.epoch, position.step_in_epoch, rank)

    def samples(self, position: Position, rank: int) -> list[Sample]:
        batches = self.plan.micro_batches(position.epoch, position.step_in_epoch, rank)
        return [self._samples[index] for batch in batches for index in batch]

    def advance(self, position: Position) -> None:
        position.step += 1
        position.step_in_epoch += 1
        if position.step_in_epoch == self.plan.steps_per_epoch:
            position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def look_ahead(self, position: Position) -> Position | None:
        following = replace(position)
        self.advance(following)
        return following if following.step < self.total_steps else None


class SeeingFeed:
    """A feed whose images are decoded while the step before is computed."""

    def __init__(self, feed: Feed, sight: Sight) -> None:
        self.feed, self.sight, self.total_steps = feed, sight, feed.total_steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lory-feed")
        self._ahead: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def take(self, position: Position, rank: int) -> list[Batch]:
        if self._ahead is not None and self._ahead[0] == (position.step, rank):
            batches = self._ahead[1].result()
        else:
            batches = self._load(position, rank)
        self._ahead = None
        if (following := self.feed.look_ahead(position)) is not None:
            self._ahead = (following.step, rank), self._pool.submit(self._load, following, rank)
        return batches

    def _load(self, position: Position, rank: int) -> list[Batch]:
        return [self.sight.load(batch) for batch in self.feed.take(position, rank)]

    def samples(self, position: Position, rank: int) -> list[Sample]:
        return self.feed.samples(position, rank)

    def advance(self, position: Position) -> None:
        self.feed.advance(position)

    def look_ahead(self, position: Position) -> Position | None:
        return self.feed.look_ahead(position)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(cancel_futures=True)


class StreamFeed:
    """Windows of a stream, each in an order of its own."""

    def __init__(self, stream: Stream, plan: Plan, batching: Batching, total_steps: int) -> None:
        """`plan`: how many rows make a step; its rows are those of the first window."""
        self.stream, self.plan, self.batching, self.total_steps = stream, plan, batching, total_steps
        self._window: Window | None = None
        self._starts: tuple[int, ...] | None = None

    def take(self, position: Position, rank: int) -> list[Batch]:
        window = self._load(position.window_starts)
        return self.batching.make(window.samples, self.plan, _number(position), position.step_in_epoch, rank)

    def samples(self, position: Position, rank: int) -> list[Sample]:
        window = self._load(position.window_starts)
        batches = self.plan.micro_batches(_number(position), position.step_in_epoch, rank)
        return [window.samples[index] for batch in batches for index in batch]

    def advance(self, position: Position) -> None:
        ends = self._load(position.window_starts).ends
        position.step += 1
        position.step_in_epoch += 1
        if position.step_in_epoch < self.plan.steps_per_epoch or position.step == self.total_steps:
            return
        position.step_in_epoch, position.window, position.window_starts = 0, position.window + 1, ends
        if not self._load(ends).samples.supervised.any():
            for source in self.stream.report():
                for reason, count in source["dropped"].items():
                    log.info("%s: %d of %d records dropped: %s", source["name"], count, source["read_so_far"], reason)
            position.epoch, position.window, position.window_starts = position.epoch + 1, 0, ()

    def look_ahead(self, position: Position) -> Position | None:
        # the next window is read when it is its turn
        if position.step_in_epoch + 1 >= self.plan.steps_per_epoch or position.step + 1 >= self.total_steps:
            return None
        return replace(position, step=position.step + 1, step_in_epoch=position.step_in_epoch + 1)

    def _load(self, starts: tuple[int, ...]) -> Window:
        if self._window is None or self._starts != starts:
            self._window, self._starts = self.stream.read(starts), starts
            batching = self.batching
            rows = plan_rows(self._window.samples, batching.packing, batching.max_tokens, len(batching.leading))
            self.plan = replace(self.plan, rows=rows)
        return self._window


def _number(position: Position) -> int:
    """What the order of a window's rows is drawn with; of the first window, the epoch, as of a set."""
    return 1000 * position.window + position.epoch
