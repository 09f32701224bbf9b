"""Tool calls, their results, reasoning and weights are read in every form that data sets write them in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lory.data.records.formats import Dropped, convert, explain
from lory.runtime import UsageError
from lory.types import Conversation, Message, ToolCall

WHERE = "a.jsonl line 7"
ARGUMENTS = {"city": "北京", "days": 2}
SCHEMA = {"name": "weather", "description": "The weather", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SCHEMA}]


def expected(identity: str = "", name: str = "") -> Conversation:
    messages = (
        Message("user", "How is it?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "北京", "days": 2}', identity),)),
        Message("tool", "sunny", name=name, tool_call_id=identity),
        Message("assistant", "Sunny."),
    )
    return Conversation(messages, tools=json.dumps(TOOLS, ensure_ascii=False))


def openai(call: dict[str, Any], result: dict[str, Any], tools: Any = TOOLS) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", **call},
        {"content": "sunny", **result},
        {"role": "assistant", "content": "Sunny."},
    ]
    return {"messages": messages, "tools": tools}


def one_call(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}} | fields
    return {"content": None, "tool_calls": [call]}


CALL_TEXT = json.dumps({"name": "weather", "arguments": ARGUMENTS})
SHAREGPT_TURNS = [
    {"from": "human", "value": "How is it?"},
    {"from": "function_call", "value": CALL_TEXT},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "Sunny."},
]

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("messages", openai(one_call(json.dumps(ARGUMENTS)), {"role": "tool"})),
    ("messages", openai(one_call(ARGUMENTS), {"role": "tool"}, tools=json.dumps(TOOLS))),
    ("messages", openai(one_call(ARGUMENTS) | {"content": ""}, {"role": "tool"}, tools=[SCHEMA])),
    ("messages", openai(one_call(ARGUMENTS), {"role": "tool_response"}, tools=[json.dumps(SCHEMA)])),
    ("messages", openai({"tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]}, {"role": "tool"})),
    (
        "messages",
        openai({"content": None, "function_call": {"name": "weather", "arguments": ARGUMENTS}}, {"role": "function"}),
    ),
    ("messages", openai({"role": "tool_call", "content": CALL_TEXT}, {"role": "tool"})),
    ("sharegpt", {"conversations": SHAREGPT_TURNS, "tools": json.dumps([SCHEMA])}),
    ("sharegpt", {"conversations": openai(one_call(ARGUMENTS), {"role": "tool"})["messages"], "tools": TOOLS}),
]


@pytest.mark.parametrize(("format", "record"), FORMS)
def test_a_call_is_equal_in_every_form(format: str, record: dict[str, Any]) -> None:
    assert convert(record, format, WHERE) == expected()


def test_a_call_keeps_its_id_and_a_result_its_name() -> None:
    record = openai(one_call(ARGUMENTS, id="c1"), {"role": "tool", "tool_call_id": "c1", "name": "weather"})
    assert convert(record, "messages", WHERE) == expected("c1", "weather")


def test_several_calls_are_one_message_with_the_text_before_them() -> None:
    turns = [
        {"from": "human", "value": "How is it?"},
        {"from": "gpt", "value": "I'll look."},
        {"from": "function_call", "value": CALL_TEXT},
        {"from": "function_call", "value": f"[{CALL_TEXT}, {CALL_TEXT}]"},
        {"from": "observation", "value": "sunny"},
        {"from": "observation", "value": ""},
        {"from": "gpt", "value": "Sunny."},
    ]
    messages = convert({"conversations": turns}, "sharegpt", WHERE).messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1].content == "I'll look."
    assert messages[1].tool_calls == (ToolCall("weather", '{"city": "北京", "days": 2}'),) * 3


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    messages = convert(openai(one_call(arguments), {"role": "tool"}), "messages", WHERE).messages
    assert messages[1].tool_calls == (ToolCall("weather", "{}"),)


def test_a_conversation_may_end_with_a_call_and_a_call_may_be_written_into_the_text() -> None:
    ending = {"messages": openai(one_call(ARGUMENTS), {"role": "tool"})["messages"][:2]}
    assert convert(ending, "messages", WHERE).messages == expected().messages[:2]
    in_text = openai({"content": "<tool_call>weather</tool_call>"}, {"role": "tool"})
    assert convert(in_text, "messages", WHERE).messages[2] == Message("tool", "sunny")


@pytest.mark.parametrize("tools", [None, "", "  ", [], "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert convert(openai(one_call({}), {"role": "tool"}, tools), "messages", WHERE).tools == ""


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, None),
        ({"loss": None, "weight": None}, None),
        ({"loss": True}, 1.0),
        ({"loss": False}, 0.0),
        ({"loss": 1}, 1.0),
        ({"loss": 0}, 0.0),
        ({"weight": 0.5}, 0.5),
        ({"loss_scale": 2}, 2.0),
        ({"loss": True, "weight": 3}, 3.0),
        ({"loss": False, "weight": 3}, 0.0),
    ],
)
def test_a_message_may_have_a_weight(fields: dict[str, Any], weight: float | None) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]
    assert convert({"messages": messages}, "messages", WHERE).messages[1].weight == weight


@pytest.mark.parametrize(
    ("scale", "weights"),
    [
        ("default", [None, None, None, None]),
        ("last_round", [None, 0.0, None, 1.0]),
        ("all", [1.0, 1.0, 1.0, 1.0]),
        (0.5, [None, 0.5, None, 0.5]),
    ],
)
def test_loss_scale_of_a_record_weighs_its_messages(scale: Any, weights: list[float | None]) -> None:
    record = {"query": "c", "response": "d", "history": [["a", "b"]], "loss_scale": scale}
    messages = convert(record, "query_response", WHERE).messages
    assert [message.weight for message in messages] == weights


def test_xtuners_output_with_loss_is_a_weight() -> None:
    turns = [{"input": "a", "output": "b", "output_with_loss": False}, {"input": "c", "output": "d"}]
    assert [m.weight for m in convert({"conversation": turns}, "xtuner", WHERE).messages] == [None, 0.0, None, None]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_apart_from_the_answer_and_filled(key: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: "I am {{name}}."}]
    conversation = convert({"messages": messages}, "messages", WHERE, {"name": "Lory", "author": "x"})
    assert conversation.messages[1] == Message("assistant", "b", reasoning="I am Lory.")


def test_reasoning_alone_is_an_empty_answer() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "reasoning": "hm"}]
    with pytest.raises(Dropped, match="empty answer"):
        convert({"messages": messages}, "messages", WHERE)


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]}


def roles(*names: str) -> dict[str, Any]:
    calls = {"tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]}
    return {"messages": [{"role": n.rstrip("!"), "content": "x", **(calls if "!" in n else {})} for n in names]}


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    (
        "messages",
        openai(one_call("{city"), {"role": "tool"}),
        "'messages[1].tool_calls[0].function.arguments' is not v",
    ),
    ("messages", openai(one_call("[1]"), {"role": "tool"}), "arguments' is a list, but a JSON object is expected"),
    ("messages", openai(one_call({"x": float("nan")}), {"role": "tool"}), "arguments' cannot be written as JSON"),
    ("messages", answer(tool_calls=[{"function": {}}]), "'messages[1].tool_calls[0].function' has no 'name'"),
    ("messages", answer(tool_calls=[{"name": ""}]), "'messages[1].tool_calls[0].name' is empty"),
    ("messages", answer(tool_calls="f()"), "'messages[1].tool_calls' is text, but a list of tool calls is expected"),
    ("messages", answer(tool_calls=["f"]), "'messages[1].tool_calls[0]' is text, but an object"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a", **one_call({})}]},
        "only a message from 'assistant' may",
    ),
    ("messages", answer() | {"tools": "[{"}, "'tools' is not valid JSON"),
    ("messages", answer() | {"tools": {"name": "f"}}, "'tools' is an object, but a list of tools is expected"),
    ("messages", answer() | {"tools": [{"type": "function"}]}, "'tools[0]' has no 'name'"),
    ("messages", answer() | {"tools": [{"function": {"name": 3}}]}, "'tools[0].function.name' is the number 3"),
    ("messages", answer(loss="no"), "'messages[1].loss' is text, but true or false is expected"),
    ("messages", answer(loss=0.5), "'messages[1].loss' is the number 0.5, but true or false"),
    ("messages", answer(weight=-1), "'messages[1].weight' is the number -1, but a weight from 0 to 1000 is"),
    ("messages", answer(weight=float("inf")), "'messages[1].weight' is the number inf"),
    ("messages", answer(loss_scale=True), "'messages[1].loss_scale' is true, but a weight"),
    ("messages", answer(weight=1, loss_scale=2), "different numbers under 'weight', 'loss_scale'"),
    ("messages", answer(reasoning="a", thinking="b"), "different texts under 'reasoning', 'thinking'"),
    ("messages", {"messages": [{"role": "user", "content": "a", "thinking": "b"}]}, "'messages[0].thinking' is given"),
    ("messages", answer() | {"loss_scale": "react"}, "'loss_scale' is 'react', but 'default', 'last_round', 'all'"),
    ("messages", answer() | {"objects": {"bbox": [[1, 2]]}}, "'objects' holds boxes"),
    ("messages", roles("user", "assistant!", "user"), "turn 3 is from 'user' where 'tool' is expected; a message that"),
    ("messages", roles("user", "assistant!", "assistant"), "turn 3 is from 'assistant' where 'tool' is expected"),
    ("messages", roles("user", "assistant!", "tool", "user"), "turn 4 is from 'user' where 'assistant' is expected"),
    ("messages", roles("user", "assistant!", "tool"), "ends with turn 3 from 'tool'"),
    ("messages", roles("user", "tool"), "turn 2 is from 'tool' where 'assistant' is expected"),
    ("messages", roles("tool", "assistant"), "turn 1 is from 'tool' where 'user' is expected"),
    ("messages", roles("user", "assistant", "assistant"), "two answers in a row have to be joined into one"),
    ("messages", roles("user", "developer", "assistant"), "turn 2 is from 'system' where 'assistant' is expected"),
    ("messages", roles("critic"), "unknown role 'critic'; known are 'system', 'user', 'assistant', 'tool'"),
    (
        "messages",
        openai(one_call({}, id="c1"), {"role": "tool", "tool_call_id": "c2"}),
        "turn 3 is the result of the tool call 'c2', but the assistant made the calls 'c1'",
    ),
    (
        "sharegpt",
        {"conversations": [SHAREGPT_TURNS[0], {"from": "function_call", "value": "weather"}]},
        "'conversations[1].value' is not valid JSON",
    ),
    (
        "sharegpt",
        {"conversations": [SHAREGPT_TURNS[0], {"from": "function_call", "value": "[]"}]},
        "'conversations[1].value' is an empty list",
    ),
    (
        "messages",
        {"messages": [*answer(weight=0)["messages"], {"role": "tool_call", "content": CALL_TEXT}]},
        "'messages[2]' has another weight than the message before",
    ),
    (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "output_with_loss": "no"}]},
        "'conversation[0].output_with_loss' is text, but true or false",
    ),
]


@pytest.mark.parametrize(("format", "record", "problem"), MALFORMED)
def test_a_malformed_record_is_an_error_that_names_the_key(format: str, record: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(record, format, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert problem in str(caught.value)


def test_calls_and_tools_are_explained() -> None:
    lines = explain(FORMS[0][1]).splitlines()
    assert 'assistant: "" (0 characters), calls weather({"city": "北京", "days": 2})' in lines
    assert lines[-1] == "tools: weather"
