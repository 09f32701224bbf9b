"""Likeness of answers, against examples by hand and against comparing every pair."""

from __future__ import annotations

import random
import time

import pytest
import torch

from lory.metrics.similarity import find_near_duplicates, list_shingles, resemblance, self_similarity
from lory.runtime import UsageError


def test_resemblance_is_the_share_of_common_shingles() -> None:
    # ab bc cd and ab bc ce: two of four
    assert resemblance(list_shingles("a b c d", 2), list_shingles("a b c e", 2)) == pytest.approx(2 / 4)


def test_self_similarity_is_the_mean_over_pairs() -> None:
    assert self_similarity(["a b", "A, b!", "a c"], n=1) == pytest.approx(5 / 9)
    assert self_similarity(["same words here"] * 4) == 1.0
    assert self_similarity(["one two", "three four"]) == 0.0
    assert self_similarity(["alone"]) == 0.0
    assert self_similarity([torch.tensor([1, 2, 3]), [1, 2, 3]]) == 1.0


def test_answers_shorter_than_a_shingle_are_compared_as_a_whole() -> None:
    assert self_similarity(["Yes.", "yes"]) == 1.0
    assert self_similarity(["Yes.", "No."]) == 0.0
    assert self_similarity(["", ""]) == 1.0


def literal_groups(answers: list[list[int]], threshold: float, n: int) -> list[tuple[int, ...]]:
    """Each answer against the first one of every group, unless it is equal to an earlier one."""
    groups: dict[int, list[int]] = {}
    for number, answer in enumerate(answers):
        shingles = list_shingles(answer, n)
        equal = [group for group in groups.values() for i in group if list_shingles(answers[i], n) == shingles]
        if equal:
            equal[0].append(number)
            continue
        likeness = {first: resemblance(shingles, list_shingles(answers[first], n)) for first in groups}
        best = max(likeness, key=lambda first: likeness[first], default=None)
        if best is not None and likeness[best] >= threshold:
            groups[best].append(number)
        else:
            groups[number] = [number]
    return [tuple(group) for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 2])
def test_near_duplicates_are_those_of_comparing_with_every_group(threshold: float, n: int) -> None:
    random.seed(n)
    bases = [[random.randrange(12) for _ in range(random.randrange(12))] for _ in range(25)]
    answers = []
    for _ in range(150):
        answer = list(random.choice(bases))
        for _ in range(random.randrange(4)):
            if answer:
                answer[random.randrange(len(answer))] = random.randrange(12)
        answers.append(answer)
    found = find_near_duplicates(answers, threshold, n)
    assert found == literal_groups(answers, threshold, n)
    assert found


def test_ten_thousand_answers_take_seconds_even_if_all_are_alike() -> None:
    random.seed(0)
    words = [str(number) for number in range(500)]
    empty = ["I", "am", "sorry", "but", "I", "can", "not", "help", "you", "with", "that", "so", "ask", "me", "again"]
    different = [random.choices(words, k=20) for _ in range(5000)]
    alike = [[*empty, random.choice(words)] for _ in range(5000)]
    start = time.perf_counter()
    groups = find_near_duplicates([*different, *alike])
    # comparing all pairs would take minutes
    assert time.perf_counter() - start < 20
    assert groups == [tuple(range(5000, 10000))]


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="n = 0 was given"):
        self_similarity(["a"], n=0)
    with pytest.raises(UsageError, match=r"threshold of 1\.2"):
        find_near_duplicates(["a"], threshold=1.2)
