"""A preference pair is equal in every form; what has nothing to prefer is dropped or an error."""

from __future__ import annotations

from typing import Any

import pytest

from lory.data.records.fields import ReadOptions
from lory.data.records.formats import Dropped, convert, explain, recognise
from lory.runtime import UsageError
from lory.types import Conversation, Media, Message

WHERE = "a.jsonl line 7"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
HUMAN, GPT = {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}
PAIR = Conversation((Message("user", "2 + 2?"), Message("assistant", "4")), rejected=(Message("assistant", "5"),))
WITH_SYSTEM = Conversation((Message("system", "Be brief."), *PAIR.messages), rejected=PAIR.rejected)

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("preference", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}),
    ("preference", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    ("preference", {"prompt": "2 + 2?", "chosen": GOOD, "rejected": [BAD]}),
    ("preference", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    ("preference", {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}),
    ("preference", {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    ("preference", {"question": "2 + 2?", "chosen": "4", "rejected": "5"}),
    ("preference", {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"}),
    ("preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "5"}}),
    ("preference", {"messages": [USER], "chosen": GOOD, "rejected": BAD}),
    (
        "preference",
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
    ),
    ("messages", {"messages": [USER, GOOD], "rejected_response": "5"}),
    ("messages", {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}),
    ("query_response", {"query": "2 + 2?", "response": "4", "rejected_response": "5"}),
    ("alpaca", {"instruction": "2 + 2?", "output": "4", "rejected_response": "5"}),
    ("sharegpt", {"conversations": [HUMAN, GPT], "rejected_response": "5"}),
]


@pytest.mark.parametrize(("format", "record"), FORMS)
def test_a_pair_is_equal_in_every_form(format: str, record: dict[str, Any]) -> None:
    assert recognise(record) == format
    assert convert(record, format, WHERE) == PAIR


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    ],
)
def test_a_pair_may_have_a_system_prompt(record: dict[str, Any]) -> None:
    assert convert(record, "preference", WHERE) == WITH_SYSTEM


def test_a_pair_may_stand_after_a_history() -> None:
    record = {"query": "c", "history": [["a", "b"]], "chosen": "d", "rejected": "{{name}}"}
    pair = convert(record, "preference", WHERE, {"name": "Lory", "author": "x"})
    assert [message.content for message in pair.messages] == ["a", "b", "c", "d"]
    assert pair.rejected == (Message("assistant", "Lory"),)
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    assert convert({"chosen": f"{dialogue}d", "rejected": f"{dialogue}Lory"}, "preference", WHERE) == pair


def test_a_pair_may_have_an_image() -> None:
    record = {"prompt": "<image>?", "chosen": "4", "rejected": "5", "images": ["a.png"]}
    pair = convert(record, "preference", WHERE, options=ReadOptions())
    assert pair.messages[0].media == (Media("image", "a.png"),)
    assert pair.rejected == PAIR.rejected


def test_the_worse_answer_may_call_tools() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
    worse = [call, {"role": "tool", "content": "5"}, BAD]
    pair = convert({"prompt": "2 + 2?", "chosen": "4", "rejected": worse}, "preference", WHERE)
    assert [message.role for message in pair.rejected] == ["assistant", "tool", "assistant"]


def test_a_null_in_place_of_the_worse_answer_leaves_a_plain_conversation() -> None:
    record = {"messages": [USER, GOOD], "rejected_response": None, "rejected_messages": None}
    assert convert(record, "messages", WHERE) == Conversation(PAIR.messages)


def test_whether_an_answer_is_wanted_is_its_label() -> None:
    record = {"prompt": "2 + 2?", "completion": "5", "label": False}
    assert convert(record, "prompt_completion", WHERE).label == "false"
    assert convert({"messages": [USER, GOOD], "label": True}, "messages", WHERE).label == "true"
    assert convert({"messages": [USER, GOOD], "label": "False"}, "messages", WHERE).label == "false"


@pytest.mark.parametrize("label", [None, "mathematics", 7, ["easy", "sums"]])
def test_another_label_of_a_chat_says_nothing(label: Any) -> None:
    assert convert({"messages": [USER, GOOD], "label": label}, "messages", WHERE) == Conversation(PAIR.messages)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, GOOD]},
            "chosen and rejected differ before the last answer",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty answer"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "empty question"),
    ],
)
def test_a_pair_with_nothing_to_prefer_is_dropped(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as caught:
        convert(record, "preference", WHERE)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            "'chosen' is an answer alone, but there is no prompt; give it under 'prompt'",
        ),
        ({"prompt": "a", "chosen": "b"}, "the format preference needs 'rejected' too"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is null, but text, a message or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "no answer that is worse"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "'chosen' has 0 messages, but one answer is expected"),
        ({"prompt": "a", "chosen": [GOOD, GOOD], "rejected": "b"}, "'chosen' has 2 messages"),
        ({"prompt": "a", "chosen": [USER, GOOD], "rejected": "b"}, "one of 'chosen' and 'rejected' is a whole convers"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "no answer that is worse"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "'rejected' only goes on where 'chosen' ends"),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "does not begin with the messages in"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' is the number 3, but text"),
        ({"prompt": "a", "chosen": {"role": "assistant"}, "rejected": "c"}, "'chosen' has no 'content'"),
        ({"prompt": "a", "chosen": GOOD, "rejected": {"from": "bing", "value": ""}}, "'rejected.from' is the unknown"),
        ({"prompt": "a", "chosen": "b\x00", "rejected": "c"}, "'chosen' holds a NUL character at position 1"),
        ({"prompt": [USER, GOOD], "chosen": "b", "rejected": "c"}, "two answers in a row"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD, USER]}, "ends with turn 3 from 'user'"),
    ],
)
def test_a_malformed_pair_is_an_error(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(record, "preference", WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert problem in str(caught.value)


def test_a_pair_is_explained() -> None:
    assert explain(FORMS[0][1]).splitlines()[1:] == [
        'user: "2 + 2?" (6 characters)',
        'assistant: "4" (1 character)',
        'rejected assistant: "5" (1 character)',
    ]
