"""Mixing takes what the weights say, and stops where its name says."""

from __future__ import annotations

import numpy as np
import pytest

from lory.data.mixture.mixing import mix

PARTS = [np.arange(100), np.arange(50, 90), np.arange(10)]


def test_concat_takes_each_once() -> None:
    taken = mix(PARTS, [5.0, 1.0, 1.0], "concat", 0)
    assert all((a == b).all() for a, b in zip(taken, PARTS, strict=True))


@pytest.mark.parametrize(
    ("weights", "expected"), [([0.5, 0.4, 0.1], [50, 40, 10]), ([1, 1, 1], [10, 10, 10]), ([6, 2, 0.1], [100, 33, 2])]
)
def test_until_the_first_has_no_more_nothing_is_repeated(weights: list[float], expected: list[int]) -> None:
    taken = mix(PARTS, weights, "first_exhausted", 0)
    assert [len(part) for part in taken] == expected
    assert all(len(np.unique(part)) == len(part) for part in taken)
    assert all(np.isin(part, given).all() for part, given in zip(taken, PARTS, strict=True))


def test_until_all_have_no_more_the_small_repeat_and_nothing_is_missing() -> None:
    taken = mix(PARTS, [0.5, 0.3, 0.2], "all_exhausted", 0)
    assert [len(part) for part in taken] == [100, 60, 40]
    for part, given in zip(taken, PARTS, strict=True):
        numbers, counts = np.unique(part, return_counts=True)
        assert (numbers == given).all()
        assert counts.max() - counts.min() <= 1


def test_the_seed_draws() -> None:
    one, again, other = (mix(PARTS, [1, 1, 1], "first_exhausted", seed)[0].tolist() for seed in (0, 0, 1))
    assert one == again != other


def test_an_empty_source_stops_nothing() -> None:
    taken = mix([np.arange(10), np.arange(0)], [1, 1], "first_exhausted", 0)
    assert [len(part) for part in taken] == [10, 0]
