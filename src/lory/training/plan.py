"""The plan of an epoch: which samples share a row, which rows a step, and in what order."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lory.adapters.virtual_tokens import Leading
from lory.data.encoding.samples import Samples
from lory.data.mixture.collate import Batch, collate
from lory.data.mixture.packing import Rows, pack
from lory.training.optim import TrainConfig
from lory.types import IGNORE, Sample

NO_LEADING = Leading()


@dataclass(frozen=True)
class Plan:
    """Which samples are learnt together: rows (lists of sample indices), and how many rows make a step."""

    rows: Rows
    batch_size: int
    accumulate: int
    processes: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        """Rows that all ranks and micro-batches of one optimizer step take together."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may have fewer rows."""
        return math.ceil(len(self.rows) / self.rows_per_step)

    def order(self, epoch: int) -> list[int]:
        """The rows' order in an epoch, a function of seed and epoch alone, so that a resumed run finds its place."""
        found: list[int] = self._permute(epoch).tolist()
        return found

    def _permute(self, epoch: int) -> torch.Tensor:
        return _permute(len(self.rows), self.seed * 1_000_003 + epoch)

    def micro_batches(self, epoch: int, step: int, rank: int) -> list[list[int]]:
        """Sample indices of each micro-batch of this rank in an epoch's step; at the end some may be empty."""
        here = slice(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        rows = self._permute(epoch)[here].tolist()
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        # every rank must run the same number of passes, or they would wait for each other for ever
        batches += [[] for _ in range(-len(batches) % self.processes)]
        return [[index for row in batch for index in self.rows[row]] for batch in batches[rank :: self.processes]]


@functools.lru_cache(maxsize=1)
def _permute(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in random order; the last answer is kept, since every step of an epoch asks."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def plan_rows(samples: Samples, packing: bool, max_tokens: int, leading: int = 0) -> Rows:
    """Rows of the samples that have something to learn: packed, or one sample a row.

    Args:
        max_tokens: length of a packed row, and of the longest sample.
        leading: tokens of a soft prompt that each sample will begin with, for which a row is longer by once as many.
    """
    useful = samples.supervised.nonzero()[0]
    if not packing:
        return Rows.one_each(useful)
    return pack(samples.lengths[useful] + leading, max_tokens + leading).take(useful)


def count_steps(config: TrainConfig, plan: Plan, streamed: bool = False) -> int:
    """Optimizer steps of the whole run; a stream's length is not known, so it may end sooner."""
    if streamed and config.max_steps:
        return config.max_steps
    steps = config.epochs * plan.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def fold(
    batches: Sequence[Sequence[int]], samples: Samples, most_tokens: int, most_samples: int, leading: int = 0
) -> list[Counter[int]]:
    """Micro-batches in which each different sample is once, with how often it was there in all of them.

    The gradient of a sum does not depend on how often equal terms are computed. Neighbours that have become small
    enough are joined, so there are never more micro-batches than before.

    Args:
        batches: sample indices of each micro-batch of one optimizer step.
        most_tokens: how many tokens a joined micro-batch may have.
        most_samples: how many samples it may have.
        leading: tokens that each sample will begin with, which count, too.

    Returns:
        For each micro-batch, how often each sample (the first of those that are equal) is there.
    """
    first: dict[tuple[int, int], tuple[int, Counter[int]]] = {}
    folded: list[Counter[int]] = []
    for batch in batches:
        new = Counter[int]()
        for index in batch:
            kept, counter = first.setdefault(samples.identity(index), (index, new))
            counter[kept] += 1
        folded.append(new)
    return _join(folded, samples, most_tokens, most_samples, leading)


def _join(
    batches: Sequence[Counter[int]], samples: Samples, most_tokens: int, most_samples: int, leading: int
) -> list[Counter[int]]:
    joined: list[Counter[int]] = []
    tokens = 0
    for batch in batches:
        more = sum(int(samples.lengths[index]) + leading for index in batch)
        if joined and tokens + more <= most_tokens and len(joined[-1]) + len(batch) <= most_samples:
            joined[-1].update(batch)
            tokens += more
        else:
            joined.append(batch)
            tokens = more
    return joined


def make_batch(
    samples: Sequence[Sample], counts: Counter[int], padded: bool, pad_id: int, leading: Leading = NO_LEADING
) -> Batch:
    """A collated micro-batch of some samples; an empty one becomes a batch in which nothing is learnt."""
    chosen = [leading.prepend(samples[index]) for index in counts]
    if not chosen:
        ids = samples[0].input_ids[:2]
        # there no times: not even a loss that needs no learnt token counts it
        return collate([leading.prepend(Sample(ids, (IGNORE,) * len(ids)))], padded, pad_id, [0])
    return collate(chosen, padded, pad_id, list(counts.values()))
