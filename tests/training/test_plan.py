"""The plan of an epoch: every sample once over all ranks, in an order of its own, equal samples computed once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lory.data.encoding.samples import Samples
from lory.data.encoding.store import Encoded, Store, Summary, Writer
from lory.data.mixture.packing import Rows
from lory.training.optim import TrainConfig
from lory.training.plan import Plan, count_steps, fold, make_batch, plan_rows
from lory.types import IGNORE, Conversation, Sample


def make_plan(rows: int, batch_size: int = 3, accumulate: int = 2, processes: int = 1, seed: int = 0) -> Plan:
    """A plan in which row n holds the samples 2 n and 2 n + 1."""
    return Plan(Rows.from_lists([2 * n, 2 * n + 1] for n in range(rows)), batch_size, accumulate, processes, seed)


@pytest.mark.parametrize("rows", [1, 5, 6, 17, 24])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_takes_every_sample_once_over_all_ranks(rows: int, processes: int) -> None:
    plan = make_plan(rows, processes=processes)
    taken: Counter[int] = Counter()
    for step in range(plan.steps_per_epoch):
        shares = [plan.micro_batches(0, step, rank) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1, "ranks would wait for each other"
        assert all(len(share) <= plan.accumulate for share in shares)
        taken.update(index for share in shares for batch in share for index in batch)
    assert taken == Counter(range(2 * rows))
    assert plan.steps_per_epoch == math.ceil(rows / (6 * processes))


def test_the_same_rows_make_a_step_however_they_are_spread() -> None:
    def step_rows(plan: Plan, processes: int) -> list[int]:
        batches = [batch for rank in range(processes) for batch in plan.micro_batches(1, 0, rank)]
        return sorted(index for batch in batches for index in batch)

    one = make_plan(24, batch_size=12, accumulate=1)
    assert step_rows(make_plan(24, 1, 12), 1) == step_rows(one, 1)
    assert step_rows(make_plan(24, 3, 2, processes=2), 2) == step_rows(one, 1)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    plan = make_plan(24)
    torch.manual_seed(1)
    first = plan.order(0)
    torch.manual_seed(2)
    assert plan.order(0) == first
    assert plan.order(1) != first
    assert make_plan(24, seed=1).order(0) != first
    assert sorted(first) == list(range(24))


SAMPLES = [
    Sample((1, 2, 3), (IGNORE, 2, 3)),
    Sample((1, 2), (1, IGNORE)),  # learns only what nothing stands before
    Sample((4, 5, 6, 7), (IGNORE, 5, 6, 7)),
    Sample((8, 9), (IGNORE, 9)),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Writer(tmp_path) as writer:
        for number, sample in enumerate(SAMPLES):
            writer.add(Conversation(text=str(number)), bytes([number] * 16), Encoded((sample,)))
        writer.finish(Summary())
    return Store(tmp_path)


def pick(store: Store, numbers: Sequence[int]) -> Samples:
    return Samples([store], np.zeros(len(numbers), dtype=np.int64), np.array(numbers))


def test_samples_with_nothing_to_learn_get_no_row(store: Store) -> None:
    samples = pick(store, range(4))
    assert plan_rows(samples, packing=False, max_tokens=8) == [[0], [2], [3]]
    packed = plan_rows(samples, packing=True, max_tokens=7)
    assert sorted(index for row in packed for index in row) == [0, 2, 3]
    assert all(sum(len(SAMPLES[index]) for index in row) <= 7 for row in packed)
    assert len(packed) == 2


def test_an_empty_micro_batch_learns_nothing(store: Store) -> None:
    samples = pick(store, range(4))
    full, empty = (make_batch(samples, Counter(batch), padded=False, pad_id=0) for batch in ([0, 2], []))
    assert (full.weight, full.learnt, empty.weight, empty.learnt) == (5, 5, 0, 0)
    assert empty.input_ids.shape == (1, 2)
    assert (full.documents, empty.documents) == (2, 0)


def test_equal_samples_of_a_step_are_computed_once(store: Store) -> None:
    samples = pick(store, [0, 2, 0, 3, 2, 0])
    assert fold([[0, 1], [2, 3], [4, 5]], samples, most_tokens=7, most_samples=9) == [{0: 3, 1: 2}, {3: 1}]
    assert fold([[0, 1], [2, 3], [4, 5]], samples, most_tokens=9, most_samples=9) == [{0: 3, 1: 2, 3: 1}]
    assert fold([[0, 1], [2, 3], [4, 5]], samples, most_tokens=9, most_samples=2) == [{0: 3, 1: 2}, {3: 1}]
    # a soft prompt makes each sample longer
    assert fold([[0, 1], [2, 3], [4, 5]], samples, 14, 9, leading=2) == [{0: 3, 1: 2}, {3: 1}]
    assert fold([[0, 1], [2, 3], [4, 5]], samples, 15, 9, leading=2) == [{0: 3, 1: 2, 3: 1}]


def test_different_samples_stay_as_they_are(store: Store) -> None:
    samples = pick(store, [0, 1, 2, 3])
    assert fold([[0, 3], [1, 2]], samples, most_tokens=7, most_samples=9) == [{0: 1, 3: 1}, {1: 1, 2: 1}]


def test_a_folded_sample_counts_as_often_as_it_was_there(store: Store) -> None:
    batch = make_batch(pick(store, [0, 2]), Counter({0: 3, 1: 1}), padded=False, pad_id=0)
    assert (batch.weight, batch.learnt, batch.tokens) == (3 * 2 + 3, 3 * 2 + 3, 7)


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(2, None, 10), (2, 7, 7), (2, 99, 10)])
def test_steps_of_a_run(epochs: int, max_steps: int | None, expected: int) -> None:
    assert count_steps(TrainConfig(epochs=epochs, max_steps=max_steps), make_plan(25)) == expected
