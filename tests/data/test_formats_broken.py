"""Whatever stands in place of a value, a record is read, dropped, or an error that begins with its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from lory.data.records.fields import ReadOptions
from lory.data.records.formats import FORMATS, Dropped, convert, explain, recognise
from lory.runtime import UsageError
from lory.types import Conversation

WHERE = "a.jsonl line 7"
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "image", "image": {"path": "a.png", "bytes": None}}, {"type": "text", "text": "?"}],
    },
    {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [CALL], "loss": True, "weight": 0.5},
    {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"},
    {"role": "assistant", "content": "1"},
]
TURNS = [{"from": "human", "value": "<image>?"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]
BESIDE = {"system": "s", "tools": [{"type": "function", "function": {"name": "f"}}]}
RECORDS: dict[str, dict[str, Any]] = {
    "alpaca": {
        "instruction": "a",
        "input": "b",
        "output": "c",
        "history": [["d", "e"]],
        "rejected_response": "f",
        **BESIDE,
    },
    "sharegpt": {
        "conversations": TURNS,
        "images": [{"bytes": b"x", "path": "a.png"}],
        "loss_scale": "last_round",
        **BESIDE,
    },
    "messages": {"messages": CHAT, "rejected_messages": [*CHAT[:-1], {"role": "assistant", "content": "2"}]},
    "prompt_completion": {"prompt": CHAT[:2], "completion": CHAT[4:], "label": True, "objects": None},
    "query_response": {"query": "<video>a", "response": "b", "history": [], "video": "a.mp4", **BESIDE},
    "xtuner": {"conversation": [{"system": "s", "input": "a", "output": "b", "output_with_loss": True}], "audio": []},
    "preference": {"prompt": CHAT[:2], "chosen": {"role": "assistant", "content": "b"}, "rejected": [CHAT[4]]},
    "image_text": {"image": "https://example.org/a.png", "text": "b"},
    "classification": {"sentence": "a", "label": 1},
    "e2e": {"text": "a||b"},
    "text": {"text": "a"},
}
ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0.5,
        float("nan"),
        10**400,
        "",
        " ",
        "x",
        "\x00",
        "\ud800",
        "{{name}}",
        "<image>",
        "[[",
        "data:",
        "://",
    ),
    *(b"", b"x", [], {}, [None], [[]], [{}], {"": None}, {"role": "user"}, ("a", "b"), {1}, object()),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def put(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(record)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def test_every_format_has_a_record_here() -> None:
    assert set(RECORDS) == set(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_a_sound_record_is_read(format: str) -> None:
    assert isinstance(convert(RECORDS[format], format, WHERE), Conversation)


def outcome(record: dict[str, Any], format: str, options: ReadOptions) -> Conversation | str:
    """The conversation, or how the reason that there is none begins and ends."""
    try:
        return convert(record, format, WHERE, None, options)
    except Dropped:
        return "dropped"
    except UsageError as error:
        return str(error)[: len(WHERE) + 2] + str(error)[-1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("media_first", [False, True])
def test_an_odd_value_anywhere_is_read_dropped_or_an_error_of_its_place(format: str, media_first: bool) -> None:
    options = ReadOptions("", "?", media_first)
    changed = [put(RECORDS[format], path, value) for path in paths(RECORDS[format]) for value in ODD_VALUES]
    outcomes = [outcome(record, format, options) for record in changed]
    read = [conversation for conversation in outcomes if isinstance(conversation, Conversation)]
    errors = outcomes.count(f"{WHERE}: .")
    assert len(read) + outcomes.count("dropped") + errors == len(changed)
    assert errors > len(read)
    for conversation in read:
        hash(conversation)
        for message in (*conversation.messages, *conversation.rejected):
            message.to_dict()
            message.content.encode()


@pytest.mark.parametrize("format", FORMATS)
def test_an_odd_record_can_be_explained(format: str) -> None:
    for path in paths(RECORDS[format]):
        for value in ODD_VALUES[::3]:
            assert explain(put(RECORDS[format], path, value), format)
    for value in ODD_VALUES:
        with pytest.raises(UsageError):
            recognise({"zzz": value})
