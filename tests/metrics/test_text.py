"""Closeness to references, against plain implementations and the libraries' own figures."""

from __future__ import annotations

import builtins
import random

import pytest

from lory.metrics.text import bleu, edit_distance, exact_match, normalized_edit_distance, rouge
from lory.runtime import UsageError


def test_exact_match_levels_white_space_and_spelling_only() -> None:
    assert exact_match(["a  b\n", "cafe\u0301", "Yes", "x"], ["a b", "caf\u00e9", "yes", ["y", "x"]]) == 0.75


def literal_distance(one: str, other: str) -> int:
    """The table of Levenshtein's distances of all prefixes, row by row."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, above = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_edit_distance_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance("你好吗", "你好") == 1


def test_edit_distance_equals_the_table() -> None:
    random.seed(0)
    for _ in range(200):
        one, other = ("".join(random.choices("abc", k=random.randrange(90))) for _ in range(2))
        assert edit_distance(one, other) == literal_distance(one, other)


def test_the_normalized_distance_is_to_the_nearest_reference() -> None:
    assert normalized_edit_distance(["abcd", ""], [["abxd", "zzzzzz"], ""]) == pytest.approx((1 / 4 + 0) / 2)
    assert normalized_edit_distance(["ab"], ["xyz"]) == 1.0


def test_bleu_of_one_and_of_several_references() -> None:
    pytest.importorskip("sacrebleu")
    text = "the quick brown fox jumps over the dog"
    found = bleu([text, "the cat sat on the mat"], [["something else", text], "the cat sat on the mat"])
    assert found["bleu"] == pytest.approx(100.0)
    assert "nrefs:var" in found["signature"]
    # by hand: of its 1- to 4-grams 7/8, 6/7, 5/6, 4/5 are right
    changed = bleu(["the quick brown fox jumps over the cat"], [text])["bleu"]
    assert changed == pytest.approx(100 * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25)


def test_bleu_of_chinese_counts_characters() -> None:
    pytest.importorskip("sacrebleu")
    found = bleu(["我今天去了北京"], ["我今天去了上海"])
    assert "tok:zh" in found["signature"]
    assert found["bleu"] == pytest.approx(100 * (5 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # 3 of 3 words found, 3 of 4 wanted; 2 of 2 and 2 of 3 pairs
    found = rouge(["the cat sat"], ["the cat sat down"])
    assert found == pytest.approx({"rouge1": 600 / 7, "rouge2": 80.0, "rougeL": 600 / 7})
    assert rouge(["b a"], [["x y", "a b"]])["rouge1"] == pytest.approx(100.0)


def test_rouge_sees_letters_beyond_ascii() -> None:
    pytest.importorskip("rouge_score")
    assert rouge(["你好世界"], ["你好"])["rouge1"] == pytest.approx(100 * 2 / 3)
    assert rouge(["Der Käse"], ["der Käse"])["rouge2"] == pytest.approx(100.0)


@pytest.mark.parametrize("measure", [exact_match, normalized_edit_distance, bleu, rouge])
def test_every_answer_needs_a_reference(measure) -> None:
    for answers, references in (([], []), (["a"], ["a", "b"]), (["a"], [[]])):
        with pytest.raises(UsageError, match="reference"):
            measure(answers, references)


@pytest.mark.parametrize(("measure", "package"), [(bleu, "sacrebleu"), (rouge, "rouge_score")])
def test_a_missing_library_is_named_with_how_to_install_it(measure, package: str, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"lory-llm\[eval\]"):
        measure(["a"], ["a"])
