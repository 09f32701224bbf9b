"""Labelled texts and pairs of texts are read with GLUE's columns and the like; what has no label is dropped."""

from __future__ import annotations

from typing import Any

import pytest

from lory.data.records.formats import Dropped, convert, explain, recognise
from lory.runtime import UsageError
from lory.types import Conversation

WHERE = "a.jsonl line 7"

PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
]


@pytest.mark.parametrize("key", ["text", "sentence"])
def test_a_text_has_a_label(key: str) -> None:
    record = {key: "Fine.", "label": 1, "idx": 0}
    assert recognise(record) == "classification"
    assert convert(record, "classification", WHERE) == Conversation(text="Fine.", label="1")


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_pair_of_texts_has_a_label(first: str, second: str) -> None:
    record = {first: "a", second: "b", "label": "entailment"}
    assert recognise(record) == "classification"
    conversation = convert(record, "classification", WHERE)
    assert conversation == Conversation(text="a", text_pair="b", label="entailment")
    assert 'second text: "b" (1 character)' in explain(record)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (0, "0"),
        (True, "true"),
        (3.8, "3.8"),
        (3.0, "3.0"),
        (-1.0, "-1.0"),
        ("spam", "spam"),
        ("-1", "-1"),
        ("好", "好"),
    ],
)
def test_a_label_is_text_and_a_mark_on_a_scale_keeps_its_point(label: Any, text: str) -> None:
    assert convert({"text": "a", "label": label}, "classification", WHERE).label == text


def test_a_users_message_without_an_answer_may_be_what_is_labelled() -> None:
    messages = [{"role": "user", "content": "Fine."}]
    assert convert({"messages": messages, "label": 1}, "messages", WHERE) == Conversation(text="Fine.", label="1")
    with pytest.raises(Dropped, match="no label"):
        convert({"messages": messages, "label": None}, "messages", WHERE)
    with pytest.raises(UsageError, match="belongs to one user's message"):
        convert({"messages": messages, "label": 1, "system": "s"}, "messages", WHERE)
    with pytest.raises(UsageError, match="ends with turn 1 from 'user'"):
        convert({"messages": messages}, "messages", WHERE)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a", "label": None}, "no label"),
        ({"text": "a", "label": -1}, "no label"),
        ({"text": "a", "label": " "}, "no label"),
        ({"text": "a", "label": float("nan")}, "no label"),
        ({"text": " ", "label": 1}, "empty text"),
        ({"sentence1": "a", "sentence2": "", "label": 1}, "empty text"),
    ],
)
def test_a_text_without_a_label_is_dropped_and_so_is_a_label_without_a_text(
    record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Dropped) as caught:
        convert(record, "classification", WHERE)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "the format classification needs 'label' too; the keys found are 'text'"),
        ({"premise": "a", "label": 1}, "the format classification needs 'sentence1'+'sentence2' or 'premise'+'hypoth"),
        ({"text": None, "label": 1}, "'text' is null, but text is expected"),
        ({"sentence1": "a", "sentence2": 2, "label": 1}, "'sentence2' is the number 2"),
        ({"text": "a", "label": [1, 3]}, "'label' is a list, but one class (a number or text) is expected"),
        ({"text": "a", "label": float("inf")}, "'label' is the number inf"),
        ({"text": "a", "label": "b\x00"}, "'label' holds a NUL character"),
        ({"text": "I am {{name}}.", "label": 1}, "the placeholder {{name}} has to be filled"),
    ],
)
def test_a_malformed_record_is_an_error(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(record, "classification", WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert problem in str(caught.value)
