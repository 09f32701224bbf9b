"""Exact duplicates are found whatever lies between them; near ones between training and evaluation are counted."""

from __future__ import annotations

import numpy as np
import pytest

from lory.data.mixture.duplicates import find_first, find_near_duplicates


@pytest.mark.parametrize("seed", range(5))
def test_each_digest_is_given_its_first_equal_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    digests = generator.integers(0, 4, (generator.integers(0, 60), 2)).astype(np.uint64)
    rows = [tuple(row) for row in digests.tolist()]
    assert find_first(digests).tolist() == [rows.index(row) for row in rows]


def make_texts(count: int, seed: int) -> list[np.ndarray]:
    """Random token ids after a prompt that all share."""
    generator = np.random.default_rng(seed)
    return [np.concatenate([np.arange(30), generator.integers(0, 50_000, 40)]) for _ in range(count)]


def test_copies_and_texts_with_a_changed_word_are_near_and_others_not() -> None:
    train, fresh = make_texts(300, 0), make_texts(60, 1)
    changed = train[7].copy()
    changed[-1] = 1
    broken = train[8].copy()
    broken[30::6] = 2  # no stretch of eight is left
    held_out = [*fresh, train[5], changed, broken]
    assert find_near_duplicates([np.concatenate(train)], [held_out, fresh]) == [2, 0]


def test_a_shared_prompt_alone_makes_nothing_near() -> None:
    assert find_near_duplicates(make_texts(300, 0), [make_texts(100, 1)]) == [0]


def test_nothing_is_near_to_nothing() -> None:
    assert find_near_duplicates([], [make_texts(3, 0)]) == [0]
    assert find_near_duplicates(make_texts(3, 0), []) == []
    assert find_near_duplicates(make_texts(3, 0), [[]]) == [0]
    assert find_near_duplicates([np.arange(3)], [[np.arange(3)]]) == [0]
