"""Messages in records: OpenAI's, ShareGPT's and ms-swift's ways to write one, with tool calls, media and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from lory.data.records.fields import (
    Malformed,
    ReadOptions,
    check_list,
    check_text,
    is_fit,
    kind_of,
    optional_text,
    part,
    quote_all,
)
from lory.data.records.media import has_columns, read_parts
from lory.data.records.tools import parse_calls, read_call, read_calls
from lory.types import Media, Message, Role, ToolCall

CALL: Final = "call"
"""The role of a message that is nothing but tool calls; it becomes part of an assistant's message."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "loss_scale")
LARGEST_WEIGHT = 1000
"""What is above it is a time or an id, not a weight."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a format writes a message: the keys of role and content, and what its roles are called."""

    role_key: str
    content_key: str
    speakers: Mapping[str, Role]
    others: Mapping[str, Role | Literal["call"]]
    """The roles that only come with tools, or are rare."""


_SPEAKERS: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES: dict[str, Role | Literal["call"]] = {"tool": "tool", "tool_call": CALL, "tool_response": "tool"}
OPENAI = Dialect("role", "content", _SPEAKERS, {**_TOOL_ROLES, "function": "tool", "developer": "system"})
SHAREGPT = Dialect(
    "from",
    "value",
    {"human": "user", "gpt": "assistant", **_SPEAKERS},
    {**_TOOL_ROLES, "function_call": CALL, "observation": "tool"},
)
_MAY_FOLLOW: dict[str, tuple[Role, ...]] = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),  # a tool's result may also answer a call in the assistant's text
    CALL: ("tool",),
    "tool": ("assistant", "tool"),
}


def read_messages(
    value: Any, key: str, dialect: Dialect, record: Mapping[str, Any], options: ReadOptions
) -> list[Message]:
    """The messages in a list, as the first one is written; `dialect` is the usual way.

    `record` is asked whether it has columns of media. Calls that follow an assistant's message, or one another, become
    one message: they are one turn of the assistant.
    """
    items = check_list(value, key, "messages")
    dialect = _find_dialect(items[0], dialect) if items else dialect
    role_key, content_key, speakers = dialect.role_key, dialect.content_key, dialect.speakers
    messages: list[Message] = []
    for number, item in enumerate(items):
        # nearly all messages are two texts; this way takes a third of the time
        if type(item) is dict and len(item) == 2:
            name, content = item.get(role_key), item.get(content_key)
            if type(name) is str and name in speakers and type(content) is str and is_fit(content):
                messages.append(Message(speakers[name], content))
                continue
        place = f"{key}[{number}]"
        message, is_call = _read_message(item, place, dialect, has_columns(record), options)
        if is_call and messages and messages[-1].role == "assistant":
            messages[-1] = _merge_calls(messages[-1], message, place)
        else:
            messages.append(message)
    return messages


def read_message(value: Any, key: str, dialect: Dialect, record: Mapping[str, Any], options: ReadOptions) -> Message:
    """A single message; see `read_messages`."""
    return _read_message(value, key, _find_dialect(value, dialect), has_columns(record), options)[0]


def _find_dialect(item: Any, usual: Dialect) -> Dialect:
    """How a message is written: as is usual, unless only the other dialect's role is there."""
    other = SHAREGPT if usual is OPENAI else OPENAI
    is_other = isinstance(item, Mapping) and usual.role_key not in item and other.role_key in item
    return other if is_other else usual


def _read_message(
    item: Any, place: str, dialect: Dialect, in_columns: bool, options: ReadOptions
) -> tuple[Message, bool]:
    """The message, and whether it is nothing but calls."""
    role_key, content_key = dialect.role_key, dialect.content_key
    name = check_text(part(item, place, role_key), f"{place}.{role_key}")
    role = dialect.speakers.get(name) or dialect.others.get(name)
    if role is None:
        known = quote_all([*dialect.speakers, *dialect.others])
        raise Malformed(f"'{place}.{role_key}' is the unknown role '{name[:40]}'; known are {known}")
    key = f"{place}.{content_key}"
    calls = _read_own_calls(item, place, role)
    media: tuple[Media, ...] = ()
    if role == CALL:
        content, calls = "", parse_calls(check_text(part(item, place, content_key), key), key)
    elif calls and item.get(content_key) is None:
        content = ""
    elif isinstance(value := part(item, place, content_key), list):
        content, media = read_parts(value, key, in_columns, options)
    else:
        content = check_text(value, key)
    message = Message(
        role="assistant" if role == CALL else role,
        content=content,
        media=media,
        reasoning=_read_reasoning(item, place, role),
        tool_calls=calls,
        name=optional_text(item, "name", f"{place}.") if role == "tool" else "",
        tool_call_id=optional_text(item, "tool_call_id", f"{place}.") if role == "tool" else "",
        weight=read_weight(item, place),
    )
    return message, role == CALL


def _read_own_calls(item: Mapping[str, Any], place: str, role: str) -> tuple[ToolCall, ...]:
    calls = read_calls(item.get("tool_calls"), f"{place}.tool_calls")
    if item.get("function_call") is not None:  # what OpenAI had before tool_calls
        calls = (*calls, read_call(item["function_call"], f"{place}.function_call"))
    if calls and role != "assistant":
        raise Malformed(f"'{place}' calls a tool, but only a message from 'assistant' may")
    return calls


def _merge_calls(message: Message, calls: Message, place: str) -> Message:
    if message.weight != calls.weight:
        raise Malformed(f"'{place}' has another weight than the message before, but both are one turn of the assistant")
    reasoning = "\n".join(text for text in (message.reasoning, calls.reasoning) if text)
    return replace(message, reasoning=reasoning, tool_calls=message.tool_calls + calls.tool_calls)


def _read_reasoning(item: Mapping[str, Any], place: str, role: str) -> str:
    found = {key: text for key in REASONING_KEYS if (text := optional_text(item, key, f"{place}."))}
    if len(set(found.values())) > 1:
        raise Malformed(f"'{place}' has different texts under {quote_all(found)}; keep one of them")
    if found and role not in ("assistant", CALL):
        raise Malformed(f"'{place}.{next(iter(found))}' is given, but only an assistant's message has reasoning")
    return next(iter(found.values()), "")


def read_weight(item: Mapping[str, Any], place: str) -> float | None:
    """How much a message counts in the loss, from `loss` (true, false, 0 or 1), `weight` and `loss_scale`."""
    loss = item.get("loss")
    if loss not in (None, False, True):  # 0 and 1 equal them
        raise Malformed(f"'{place}.loss' is {kind_of(loss)}, but true or false is expected")
    weights = {key: check_weight(item[key], f"{place}.{key}") for key in WEIGHT_KEYS if item.get(key) is not None}
    if len(set(weights.values())) > 1:
        raise Malformed(f"'{place}' has different numbers under {quote_all(weights)}; keep one of them")
    if loss is not None and not loss:
        return 0.0
    return next(iter(weights.values()), None if loss is None else 1.0)


def check_weight(value: Any, key: str) -> float:
    """The value, if it may weigh a loss."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_WEIGHT:
        raise Malformed(f"'{key}' is {kind_of(value)}, but a weight from 0 to {LARGEST_WEIGHT:g} is expected")
    return float(value)


def check_order(messages: Sequence[Message]) -> None:
    """Whether the roles follow one another as in a conversation that a model is served.

    That is: at most one system message, at the start; then user and assistant in turn, where tool results may follow
    an assistant's message (and have to, before anyone else speaks, when it calls tools). Two answers in a row are
    refused, since a model is never asked to go on after its own answer.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise Malformed("the conversation has no turns; a user's question and an assistant's answer are expected")
    state = ""
    calls: tuple[ToolCall, ...] = ()
    for number, message in enumerate(turns, 1):
        state, before = message.role, state
        if state not in _MAY_FOLLOW[before]:
            raise Malformed(_explain_order(number, message, before, turns is not messages))
        if state == "assistant":
            calls = message.tool_calls
            state = CALL if calls else state
        elif state == "tool" and message.tool_call_id:
            ids = [call.id for call in calls if call.id]
            if ids and message.tool_call_id not in ids:
                raise Malformed(
                    f"turn {number} is the result of the tool call '{message.tool_call_id[:40]}', "
                    f"but the assistant made the calls {quote_all(ids)}"
                )
    if turns[-1].role != "assistant":
        raise Malformed(
            f"the conversation ends with turn {len(turns)} from '{turns[-1].role}'; "
            "an answer from 'assistant' is expected"
        )


def _explain_order(number: int, message: Message, before: str, has_system: bool) -> str:
    place = f"turn {number}" + (" (without the system prompt)" if has_system else "")
    if message.role == "assistant" and before == "assistant":
        rule = "two answers in a row have to be joined into one, as a model is never asked to go on after its answer"
    elif before == CALL:
        rule = "a message that calls tools is followed by their results"
    else:
        rule = "user and assistant take turns, user first, after at most one system message"
    return f"{place} is from '{message.role}' where '{_MAY_FOLLOW[before][0]}' is expected; {rule}"
