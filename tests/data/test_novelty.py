"""The index finds what comparing each with all would find."""

from __future__ import annotations

import random

import pytest

from lory.data.making.novelty import NoveltyIndex, _shingle

WORDS = ["a", "the", "cat", "dog", "bird", "eats", "sees", "likes", "red", "green", "fish", "bread"]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.4, 0.5, 0.75, 1.0])
def test_the_index_decides_as_a_comparison_with_all_does(threshold: float) -> None:
    rng = random.Random(0)
    index, taken = NoveltyIndex(threshold), list[set[tuple[str, ...]]]()
    for _ in range(400):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        own = _shingle(text)
        is_new = all(len(own & other) / len(own | other) < threshold - 1e-9 for other in taken)
        assert index.add(text) == is_new
        if is_new:
            taken.append(own)
    assert len(index) == len(taken) > 1


@pytest.mark.parametrize(
    "text",
    [
        "name three COLOURS of the rainbow!",
        "Please name three colours of the rainbow.",
        "Name two colours of the rainbow.",
    ],
)
def test_small_changes_make_near_duplicates(text: str) -> None:
    index = NoveltyIndex(0.4)
    assert index.add("Name three colours of the rainbow.")
    assert not index.add(text)


def test_another_matter_is_new() -> None:
    index = NoveltyIndex(0.4)
    assert index.add("Name three colours of the rainbow.")
    assert index.add("Name three rivers in France.")
    assert index.add("说出彩虹的三种颜色。")
    assert not index.add("请说出彩虹的三种颜色。")


def test_texts_without_words_are_compared_as_they_are() -> None:
    index = NoveltyIndex(0.4)
    assert index.add("?!")
    assert index.add("...")
    assert not index.add("?!")
