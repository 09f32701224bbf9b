"""Tools in records: the functions on offer, and the calls of them, in the several forms that data sets write."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from lory.data.records.fields import Malformed, check_list, check_object, check_text, kind_of, optional_text, part
from lory.types import ToolCall


def read_tools(value: Any, key: str) -> str:
    """`Conversation.tools`: the schemas as JSON text in OpenAI's form, whether they came as text or as a list."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, str):
        return _normalise_tools(check_text(value, key), key)
    tools = check_list(value, key, "tools")
    return _dump([_wrap_tool(tool, f"{key}[{number}]") for number, tool in enumerate(tools)], key)


@functools.lru_cache(maxsize=256)
def _normalise_tools(text: str, key: str) -> str:
    # data sets repeat the same tools in thousands of records
    return read_tools(parse_json(text, key), key) if text.strip() else ""


def _wrap_tool(tool: Any, place: str) -> dict[str, Any]:
    """A schema as ``{"type": "function", "function": {...}}``; many data sets leave the outer object away."""
    if isinstance(tool, str):
        tool = parse_json(tool, place)
    inner = check_object(tool, place).get("function")
    if inner is None:
        inner, inner_place = tool, place
    else:
        inner_place = f"{place}.function"
    if not check_text(part(inner, inner_place, "name"), f"{inner_place}.name"):
        raise Malformed(f"'{inner_place}.name' is empty, but a function's name is expected")
    return {"type": "function", **tool} if inner is not tool else {"type": "function", "function": dict(tool)}


def read_calls(value: Any, key: str) -> tuple[ToolCall, ...]:
    """The calls under a message's `tool_calls`; null and an empty list are no calls."""
    if value is None:
        return ()
    return tuple(
        read_call(call, f"{key}[{number}]") for number, call in enumerate(check_list(value, key, "tool calls"))
    )


def parse_calls(text: str, key: str) -> tuple[ToolCall, ...]:
    """The calls in a message that is nothing but JSON: one ``{"name", "arguments"}``, or a list of them."""
    value = parse_json(text, key)
    calls = tuple(
        read_call(call, f"{key}[{number}]") for number, call in enumerate(value if isinstance(value, list) else [value])
    )
    if not calls:
        raise Malformed(f"'{key}' is an empty list, but a call with 'name' and 'arguments' is expected")
    return calls


def read_call(call: Any, place: str) -> ToolCall:
    """One call, with or without the object `function` around its name and arguments.

    The arguments, text or object, become JSON text of one spelling, so that equal calls are equal.
    """
    identity = optional_text(check_object(call, place), "id", f"{place}.")
    if isinstance(call.get("function"), Mapping):
        call, place = call["function"], f"{place}.function"
    name = check_text(part(call, place, "name"), f"{place}.name")
    if not name:
        raise Malformed(f"'{place}.name' is empty, but a function's name is expected")
    key = f"{place}.arguments"
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = parse_json(check_text(arguments, key), key)
    if not isinstance(arguments := arguments or {}, Mapping):
        raise Malformed(f"'{key}' is {kind_of(arguments)}, but a JSON object is expected")
    return ToolCall(name, _dump(arguments, key), identity)


def parse_json(text: str, key: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"'{key}' is not valid JSON: {error}") from None


def _dump(value: Any, key: str) -> str:
    try:
        return check_text(json.dumps(value, ensure_ascii=False, allow_nan=False), key)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"'{key}' cannot be written as JSON: {error}") from None
