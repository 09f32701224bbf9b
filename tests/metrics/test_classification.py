"""Scores of classes and numbers, against figures counted by hand."""

from __future__ import annotations

import math

import pytest

from lory.metrics.classification import classification_scores, correlation_scores
from lory.runtime import UsageError

pytest.importorskip("sklearn")

LABELS = ["spam", "spam", "spam", "ham", "ham", "ham", "ham", "ham"]
FOUND = ["spam", "spam", "ham", "spam", "ham", "ham", "ham", "ham"]


def test_scores_of_two_classes() -> None:
    # of spam 2 found, 1 missed, 1 false; of ham 4, 1, 1
    scores = classification_scores(FOUND, LABELS, positive="spam")
    assert scores["accuracy"] == pytest.approx(6 / 8)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["f1_macro"] == pytest.approx((4 / 6 + 8 / 10) / 2)
    assert scores["mcc"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


def test_f1_of_one_class_is_only_given_for_a_positive_one() -> None:
    assert "f1" not in classification_scores(FOUND, LABELS)
    assert classification_scores(FOUND, LABELS, positive="neither")["f1"] == 0.0


def test_an_answer_that_is_no_class_is_wrong() -> None:
    scores = classification_scores(["cat", None, 3], ["cat", "dog", "cat"], positive="cat")
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx(2 / 3)


def test_one_class_alone_has_no_correlation() -> None:
    assert classification_scores(["a", "a"], ["a", "b"])["mcc"] == 0.0
    assert classification_scores(["a", "a"], ["a", "a"]) == {"accuracy": 1.0, "f1_macro": 1.0, "mcc": 0.0}


def test_correlations() -> None:
    scores = correlation_scores([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert scores["pearson"] == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["rmse"] == pytest.approx(math.sqrt(1 / 3))


def test_a_constant_side_has_no_correlation_but_an_error() -> None:
    assert correlation_scores([2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0, "rmse": 1.0}


def test_uneven_or_empty_input_is_refused() -> None:
    with pytest.raises(UsageError, match="1 predictions and 2 labels"):
        classification_scores(["a"], ["a", "b"])
    with pytest.raises(UsageError, match="0 predictions"):
        correlation_scores([], [])
    with pytest.raises(UsageError, match="two or more"):
        correlation_scores([1.0], [1.0])
