"""Packing is best-fit decreasing: each sample once, no row too full, few rows, at once."""

from __future__ import annotations

import random
import time

import pytest

from lory.data.mixture.packing import efficiency, pack


def pack_slowly(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook's best-fit decreasing, by looking at every row; of equally full rows the oldest is taken."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [row for row in range(len(rows)) if free[row] >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda row: (free[row], row))].append(index)
        else:
            rows.append([index])
    return rows


def pack_first_fit(lengths: list[int], capacity: int) -> int:
    """How many rows first-fit takes, in the given order."""
    free: list[int] = []
    for length in lengths:
        for row, space in enumerate(free):
            if space >= length:
                free[row] -= length
                break
        else:
            free.append(capacity - length)
    return len(free)


def draw(seed: int) -> tuple[list[int], int]:
    generator = random.Random(seed)
    capacity = generator.choice([8, 31, 123, 512])
    longest = generator.choice([capacity, capacity // 2 + 1, capacity // 5 + 1])
    return [generator.randint(1, longest) for _ in range(generator.randint(1, 150))], capacity


@pytest.mark.parametrize("seed", range(60))
def test_random_lengths_are_packed_as_the_textbook_says(seed: int) -> None:
    lengths, capacity = draw(seed)
    rows = pack(lengths, capacity)
    assert rows == pack_slowly(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    assert -(-sum(lengths) // capacity) <= len(rows) <= pack_first_fit(lengths, capacity) + 1
    assert efficiency(sum(lengths), len(rows), capacity) == pytest.approx(sum(lengths) / (capacity * len(rows)))


def test_a_sample_goes_into_the_fullest_row_that_holds_it() -> None:
    # rows of 6 and 5 are open when the 4 comes, and the 4 fills the first
    assert pack([4, 6, 5], 10) == [[1, 0], [2]]
    assert pack([10, 10], 10) == [[0], [1]]


def test_equal_lengths_keep_their_order() -> None:
    assert pack([3, 3, 3, 3], 7) == [[0, 1], [2, 3]]


def test_nothing_is_packed_into_no_rows() -> None:
    assert pack([], 8) == []
    assert efficiency(0, 0, 8) == 0


def test_full_rows_are_fully_efficient() -> None:
    assert efficiency(16, 2, 8) == 1
    assert efficiency(12, 2, 8) == 0.75


def test_a_sample_above_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit into rows of 8"):
        pack([1, 9], 8)


@pytest.mark.parametrize(("low", "high"), [(1, 1024), (513, 1024), (1, 40)])
def test_a_hundred_thousand_samples_are_packed_in_seconds(low: int, high: int) -> None:
    generator = random.Random(0)
    lengths = [generator.randint(low, high) for _ in range(100_000)]
    start = time.process_time()
    rows = pack(lengths, 1024)
    assert time.process_time() - start < 10
    if low == 1:
        assert efficiency(sum(lengths), len(rows), 1024) > 0.99
