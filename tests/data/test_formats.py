"""Every format gives the same conversation, and every malformed record is an error that names place and key."""

from __future__ import annotations

from typing import Any

import pytest

from lory.data.records.formats import FORMATS, Dropped, convert, explain, recognise
from lory.runtime import UsageError
from lory.types import Conversation, Message

SYSTEM = "Be brief 🙂."
SINGLE = [("What is 2 + 2?", " It is 4.\n")]
MULTI = [("你好", "你好!😀"), ("And 3 + 3?", "6"), ("Thanks", "Any time.")]
WHERE = "data/a.jsonl line 57312"


def expected(turns: list[tuple[str, str]], system: str | None) -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages))


def chat(turns: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    return [message.to_dict() for message in expected(turns, system).messages]


def with_system(record: dict[str, Any], system: str | None) -> dict[str, Any]:
    return record | {"system": system} if system else record


def with_history(record: dict[str, Any], turns: list[tuple[str, str]]) -> dict[str, Any]:
    return record | {"history": [list(pair) for pair in turns[:-1]]} if len(turns) > 1 else record


def sharegpt(turns: list[tuple[str, str]], names: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": name, "value": value} for pair in turns for name, value in zip(names, pair, strict=True)]


WRITERS = {
    "alpaca": lambda turns, system: with_system(
        with_history({"instruction": turns[-1][0], "input": "", "output": turns[-1][1]}, turns), system
    ),
    "sharegpt": lambda turns, system: with_system({"conversations": sharegpt(turns, ("human", "gpt"))}, system),
    "sharegpt, other names": lambda turns, system: {
        "conversations": ([{"from": "system", "value": system}] if system else [])
        + sharegpt(turns, ("user", "assistant"))
    },
    "messages": lambda turns, system: {"messages": chat(turns, system)},
    "messages, system apart": lambda turns, system: with_system({"messages": chat(turns)}, system),
    "prompt_completion": lambda turns, system: {
        "prompt": chat(turns, system)[:-1],
        "completion": chat(turns, system)[-1:],
    },
    "query_response": lambda turns, system: with_system(
        with_history({"query": turns[-1][0], "response": turns[-1][1]}, turns), system
    ),
    "sharegpt, roles as in messages": lambda turns, system: {"conversations": chat(turns, system)},
    "messages, from and value": lambda turns, system: with_system(
        {"messages": sharegpt(turns, ("human", "gpt"))}, system
    ),
    "messages, in parts": lambda turns, system: {
        "messages": [
            message | {"content": [{"type": "text", "text": message["content"]}]} for message in chat(turns, system)
        ]
    },
    "messages, out of a table": lambda turns, system: {
        "messages": [message | {"name": None, "tool_calls": None, "loss": None} for message in chat(turns, system)],
        "tools": None,
        "system": None,
    },
    "messages, developer": lambda turns, system: {
        "messages": [
            message | {"role": message["role"].replace("system", "developer")} for message in chat(turns, system)
        ]
    },
    "xtuner, human and assistant": lambda turns, system: with_system(
        {"conversation": [{"human": question, "assistant": answer} for question, answer in turns]}, system
    ),
    "xtuner": lambda turns, system: {
        "conversation": [
            with_system({"input": question, "output": answer}, None if number else system)
            for number, (question, answer) in enumerate(turns)
        ]
    },
}


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("turns", [SINGLE, MULTI])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_conversation_is_equal_in_every_format(
    writer: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    record = WRITERS[writer](turns, system)
    format = writer.partition(",")[0]
    assert recognise(record) == format
    conversation = convert(record, format, WHERE)
    assert conversation == expected(turns, system)
    assert conversation.where == WHERE


def test_prompt_and_completion_may_be_strings() -> None:
    (question, answer) = SINGLE[0]
    record = {"prompt": question, "completion": answer}
    assert convert(record, "prompt_completion", WHERE) == expected(SINGLE, None)


def test_plain_text_is_kept_as_it_is() -> None:
    assert convert({"text": " Once 从前\r\n"}, "text", WHERE) == Conversation(text=" Once 从前\r\n")


@pytest.mark.parametrize(
    ("extra", "question"), [({"input": "b"}, "a\nb"), ({"input": " "}, "a"), ({"input": None}, "a"), ({}, "a")]
)
def test_alpaca_joins_the_input_below_the_instruction(extra: dict[str, Any], question: str) -> None:
    record = {"instruction": "a", "output": "c"} | extra
    assert convert(record, "alpaca", WHERE) == expected([(question, "c")], None)


@pytest.mark.parametrize("system", ["", "  ", None])
def test_a_blank_system_prompt_counts_as_none(system: str | None) -> None:
    assert convert({"messages": chat(SINGLE), "system": system}, "messages", WHERE) == expected(SINGLE, None)
    first = [{"role": "system", "content": system or ""}]
    assert convert({"messages": first + chat(SINGLE)}, "messages", WHERE) == expected(SINGLE, None)
    turn = {"system": system, "input": "a", "output": "b"}
    assert convert({"conversation": [turn]}, "xtuner", WHERE) == expected([("a", "b")], None)


def test_rendered_text_beside_the_parts_does_not_hide_their_format() -> None:
    assert recognise({"instruction", "input", "output", "text"}) == "alpaca"
    assert recognise({"text"}) == "text"


def test_keys_that_fit_no_format_are_listed_with_what_is_missing() -> None:
    with pytest.raises(
        UsageError, match=r"'instruction', 'response'.*alpaca lacks 'output'; query_response lacks 'query'"
    ):
        recognise(["instruction", "response"])
    with pytest.raises(UsageError, match=r"messages lacks 'messages' \(there is 'message'\)"):
        recognise(["message"])
    with pytest.raises(UsageError, match="sharegpt has 'conversations'"):
        recognise(["zzz"])


@pytest.mark.parametrize(
    ("keys", "format"),
    [
        ("text label", "classification"),
        ("sentence label idx", "classification"),
        ("sentence1 sentence2 label", "classification"),
        ("question sentence label", "classification"),
        ("messages label", "messages"),
        ("prompt completion label", "prompt_completion"),
        ("prompt chosen rejected messages score_chosen", "preference"),
        ("conversations chosen rejected", "preference"),
        ("instruction input output chosen rejected", "preference"),
        ("image text", "image_text"),
        ("image conversations id", "sharegpt"),
        ("query response images", "query_response"),
    ],
)
def test_the_richest_format_is_meant(keys: str, format: str) -> None:
    assert recognise(keys.split()) == format


def test_columns_that_a_record_leaves_empty_do_not_count() -> None:
    assert recognise({"messages": None, "instruction": "a", "output": "b"}) == "alpaca"
    assert recognise({"instruction": "a", "output": None}) == "alpaca"
    assert recognise({"text": "a", "label": None}) == "classification"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("image text label", "fits image_text and classification; say which"),
        ("label premise", "classification lacks 'sentence1'+'sentence2' or 'premise'+'hypothesis' or"),
        ("sentence", "classification lacks 'label'"),
        ("chosen prompt", "prompt_completion lacks 'completion'; preference lacks 'rejected'"),
        ("reject chosen", "preference lacks 'rejected' (there is 'reject')"),
        ("image caption", "image_text lacks 'text'"),
    ],
)
def test_near_misses_of_the_other_formats(keys: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        recognise(keys.split())
    assert problem in str(caught.value)


def test_a_line_of_e2e_is_a_prompt_and_a_completion() -> None:
    record = {"text": "name : Alimentum | family friendly : no||There is Alimentum . "}
    expected_turns = [("name : Alimentum | family friendly : no", "There is Alimentum .")]
    assert convert(record, "e2e", WHERE) == expected(expected_turns, None)
    assert recognise(record) == "text"
    with pytest.raises(UsageError, match=r"'text' has no '\|\|'"):
        convert({"text": "name : Alimentum"}, "e2e", WHERE)


def test_a_record_is_explained_to_a_person() -> None:
    record = {"instruction": "Who are you?", "output": "Lory" * 40, "id": 7, "system": "Be brief."}
    assert explain(record).splitlines() == [
        "read as alpaca, from 'instruction', 'output', 'system'; not used: 'id'",
        'system: "Be brief." (9 characters)',
        'user: "Who are you?" (12 characters)',
        f'assistant: "{("Lory" * 15)[:59]}…" (160 characters)',
    ]
    assert explain({"text": "a", "label": 1}).splitlines()[1:] == ['text: "a" (1 character)', "label: 1"]
    assert explain({"instruction": "a", "output": ""}) == "read as alpaca, and left out: empty answer"
    assert explain({"instruction": "a", "output": 3}) == "This record: 'output' is the number 3, but text is expected."
    assert explain({"text": "a||b"}, "e2e").startswith("read as e2e")
    assert "fits no format" in explain({"zzz": 1})


def test_keys_that_fit_two_formats_are_an_error() -> None:
    with pytest.raises(UsageError, match="fits alpaca and messages; say which"):
        recognise(["instruction", "output", "messages"])


def chat_of(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "a"}, "the format alpaca needs 'output' too; the keys found are 'instruction'"),
    ("alpaca", {"instruction": "a", "output": 4}, "'output' is the number 4, but text is expected"),
    ("alpaca", {"instruction": "a", "output": None}, "'output' is null, but text is expected"),
    ("alpaca", {"instruction": True, "output": "b"}, "'instruction' is true, but text"),
    ("alpaca", {"instruction": "a", "output": "b", "input": ["c"]}, "'input' is a list, but text"),
    ("alpaca", {"instruction": "a", "output": "b", "system": {}}, "'system' is an object, but text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "c"}, "'history' is text, but a list of [question"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "'history[0]' has 1 elements"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c", None]]}, "'history[0][1]' is null"),
    (
        "alpaca",
        {"instruction": "a", "output": "b\ud83d"},
        "'output' holds half a surrogate pair (\\ud83d) at position 1",
    ),
    ("alpaca", {"instruction": "a\x00", "output": "b"}, "'instruction' holds a NUL character at position 1"),
    ("sharegpt", {"conversations": {}}, "'conversations' is an object, but a list of messages is expected"),
    ("sharegpt", {"conversations": []}, "has no turns"),
    ("sharegpt", {"conversations": ["a"]}, "'conversations[0]' is text, but an object is expected"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "'conversations[0]' has no 'value'; its keys are 'from'"),
    (
        "sharegpt",
        {"conversations": [{"from": "bing", "value": "a"}]},
        "'conversations[0].from' is the unknown role 'bing'; known are 'human', 'gpt', 'system', 'user', 'assistant'",
    ),
    ("messages", chat_of("human"), "unknown role 'human'; known are 'system', 'user', 'assistant'"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "'messages[0].content' is null"),
    ("messages", {"messages": [{"role": None, "content": "a"}]}, "'messages[0].role' is null"),
    ("messages", chat_of("system"), "has no turns"),
    ("messages", chat_of("assistant", "user"), "turn 1 is from 'assistant' where 'user' is expected"),
    ("messages", chat_of("user", "user"), "turn 2 is from 'user' where 'assistant' is expected"),
    ("messages", chat_of("user", "system", "assistant"), "turn 2 is from 'system' where 'assistant' is expected"),
    ("messages", chat_of("system", "system"), "turn 1 (without the system prompt) is from 'system'"),
    ("messages", chat_of("user", "assistant", "user"), "ends with turn 3 from 'user'"),
    ("messages", {"system": "s", **chat_of("system", "user", "assistant")}, "both under 'system' and in the first"),
    ("prompt_completion", {"prompt": "a", "completion": 1.5}, "'completion' is the number 1.5, but text or a list"),
    ("prompt_completion", {"prompt": None, "completion": "b"}, "'prompt' is null, but text or a list"),
    ("query_response", {"query": b"a", "response": "b"}, "'query' is bytes, but text"),
    ("xtuner", {"conversation": [{"input": "a"}]}, "'conversation[0]' has no 'output'"),
    (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b"}, {"input": "a", "output": "b", "system": "s"}]},
        "'conversation[1].system' is given, but a system prompt belongs in the first turn only",
    ),
    ("text", {"text": 3}, "'text' is the number 3, but text is expected"),
    ("text", {"text": "I am {{NAME}}."}, "the placeholder {{NAME}} has to be filled; give both 'name' and 'author'"),
    ("alpaca", {"instruction": "a", "output": "By {{author}}."}, "the placeholder {{author}} has to be filled"),
]


@pytest.mark.parametrize(("format", "record", "problem"), MALFORMED)
def test_a_malformed_record_is_an_error_that_begins_with_its_place(
    format: str, record: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        convert(record, format, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("alpaca", {"instruction": "a", "output": " \n"}, "empty answer"),
        ("alpaca", {"instruction": "", "input": "", "output": "b"}, "empty question"),
        ("query_response", {"query": "a", "response": "b", "history": [["c", ""]]}, "empty answer"),
        ("text", {"text": "\t"}, "empty text"),
    ],
)
def test_an_empty_record_is_dropped_with_a_reason(format: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as caught:
        convert(record, format, WHERE)
    assert caught.value.reason == reason


def test_an_error_later_in_a_record_outweighs_an_empty_answer() -> None:
    record = {"messages": [*chat([("a", "")]), {"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UsageError, match=r"messages\[2\]\.content"):
        convert(record, "messages", WHERE)


def test_placeholders_are_filled_once_and_code_in_double_braces_is_kept() -> None:
    record = {"instruction": "Who is {{NAME}}?", "output": "{{name}} by {{author}}, not {{ name }} or {{x}}."}
    conversation = convert(record, "alpaca", WHERE, {"name": "{{author}}", "author": "花花"})
    assert conversation == expected([("Who is {{author}}?", "{{author}} by 花花, not {{ name }} or {{x}}.")], None)


def test_every_format_is_tested() -> None:
    elsewhere = {"text", "e2e", "image_text", "preference", "classification"}
    assert {writer.partition(",")[0] for writer in WRITERS} | elsewhere == set(FORMATS)
