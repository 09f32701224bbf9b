"""The repetition measures against examples counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lory.metrics.repetition import (
    distinct_n,
    diversity,
    rep_l,
    repetition_scores,
    seq_rep_n,
    token_entropy,
    unique_tokens,
)
from lory.runtime import UsageError

# 1-grams 1 2 3 1 2 3 1: 3 of 7 are unique; 2-grams 12 23 31 12 23 31: 3 of 6;
# 3-grams 123 231 312 123 231: 3 of 5; 4-grams 1231 2312 3123 1231: 3 of 4
LOOP = [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(("n", "expected"), [(1, 1 - 3 / 7), (2, 1 - 3 / 6), (3, 1 - 3 / 5), (4, 1 - 3 / 4)])
def test_seq_rep_n_is_one_minus_the_share_of_unique_ngrams(n: int, expected: float) -> None:
    assert seq_rep_n(LOOP, n) == pytest.approx(expected, abs=1e-12)


def test_ngrams_overlap() -> None:
    assert seq_rep_n([7] * 5, 2) == pytest.approx(1 - 1 / 4)


def test_a_sequence_without_repeats_scores_zero_and_is_fully_diverse() -> None:
    assert [seq_rep_n(range(10), n) for n in (1, 2, 3, 4)] == [0.0] * 4
    assert diversity(range(10)) == 1.0


@pytest.mark.parametrize("ids", [[], [5], [5, 5, 5]])
def test_fewer_than_n_tokens_score_zero(ids: list[int]) -> None:
    assert seq_rep_n(ids, 4) == 0.0


def test_rep_l_counts_tokens_seen_in_the_window_before_them() -> None:
    # the second 1 stands two tokens after the first, the second 2 five tokens after the first
    ids = [1, 2, 1, 3, 4, 5, 2]
    assert rep_l(ids, 1) == 0.0
    assert rep_l(ids, 2) == pytest.approx(1 / 7)
    assert rep_l(ids, 4) == pytest.approx(1 / 7)
    assert rep_l(ids, 5) == pytest.approx(2 / 7)


def test_rep_l_agrees_with_its_definition_taken_literally() -> None:
    ids = [3, 1, 3, 3, 2, 1, 4, 4, 2, 3, 1, 1]
    for window in range(1, 14):
        literal = sum(token in ids[max(0, t - window) : t] for t, token in enumerate(ids)) / len(ids)
        assert rep_l(ids, window) == pytest.approx(literal)


def test_rep_l_of_nothing_is_zero() -> None:
    assert rep_l([], 16) == 0.0


def test_unique_tokens_counts_each_token_once() -> None:
    assert unique_tokens(LOOP) == 3
    assert unique_tokens([]) == 0


def test_diversity_is_the_product_over_two_to_four_grams() -> None:
    assert diversity(LOOP) == pytest.approx((3 / 6) * (3 / 5) * (3 / 4))


def test_scores_have_the_five_names_at_full_precision() -> None:
    assert repetition_scores(LOOP) == {
        "seq_rep_1": 1 - 3 / 7,
        "seq_rep_2": 1 - 3 / 6,
        "seq_rep_3": 1 - 3 / 5,
        "seq_rep_4": 1 - 3 / 4,
        "diversity": diversity(LOOP),
    }


def test_a_tensor_scores_like_the_list_of_its_values() -> None:
    ids = torch.tensor(LOOP)
    assert repetition_scores(ids) == repetition_scores(LOOP)
    assert rep_l(ids, 3) == rep_l(LOOP, 3) == pytest.approx(4 / 7)
    assert unique_tokens(ids) == 3


@pytest.mark.parametrize(("measure", "letter"), [(seq_rep_n, "n"), (rep_l, "l")])
def test_a_length_below_one_is_refused(measure, letter: str) -> None:
    with pytest.raises(UsageError, match=f"{letter} = 0 was given"):
        measure([1, 2], 0)


def test_a_string_counts_by_words_and_chinese_by_characters() -> None:
    assert seq_rep_n("The cat, the CAT.", 2) == pytest.approx(1 - 2 / 3)
    assert seq_rep_n("你好，你好。", 2) == pytest.approx(1 - 2 / 3)
    assert unique_tokens("one two  two") == 2
    assert rep_l("one two two", 1) == pytest.approx(1 / 3)
    assert repetition_scores("a b c a b c a") == repetition_scores(LOOP)


def test_distinct_n_divides_different_ngrams_by_the_tokens_of_all_answers() -> None:
    # 2-grams: ab bc, ab; two are different; five tokens
    assert distinct_n(["a b c", "a b"], 2) == pytest.approx(2 / 5)
    assert distinct_n([[1, 2, 3], torch.tensor([1, 2])], 1) == pytest.approx(3 / 5)
    assert distinct_n(["", []], 2) == 0.0


def test_token_entropy_is_log_of_the_number_of_equally_frequent_ngrams() -> None:
    assert token_entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert token_entropy([[1, 1, 2]]) == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    assert token_entropy([[1, 2, 3]], n=2) == pytest.approx(math.log(2))
    assert token_entropy([[5, 5, 5]]) == 0.0
    assert token_entropy([]) == 0.0


@pytest.mark.parametrize("measure", [distinct_n, token_entropy])
def test_ngrams_of_no_tokens_are_refused(measure) -> None:
    with pytest.raises(UsageError, match="n = 0 was given"):
        measure([[1, 2]], 0)
