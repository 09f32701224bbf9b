"""Formats: a record out of a file, whatever its shape, becomes a `Conversation`. Nothing downstream knows a format."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lory.runtime import UsageError
from lory.types import Conversation, Message, Role

MESSAGE_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", **MESSAGE_ROLES}

# a tokenizer cannot encode a lone surrogate, and a NUL is the trace of a broken file
_UNFIT = re.compile("[\x00\ud800-\udfff]")
# only these two can be filled, and only without spaces: `{{ name }}` is at home in Jinja and Vue code
_PLACEHOLDER = re.compile(r"\{\{(name|author)\}\}", re.IGNORECASE)


class Dropped(Exception):
    """The record is well-formed but has nothing to learn from; it is left out and counted under `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Malformed(Exception):
    """What is wrong with a record; `convert` puts the place before it."""


@dataclass(frozen=True, slots=True)
class Format:
    """The keys of a record, and the function that reads them.

    `read` returns the messages, or a string for plain text. A "system" among the optional keys is put before the
    messages by `convert`.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Message] | str]

    @property
    def keys(self) -> tuple[str, ...]:
        return self.required + self.optional


def recognise(keys: Collection[str]) -> str:
    """The name of the format whose required keys are among `keys`.

    Raises:
        UsageError: no format fits, or several do; the sentence lists the keys and the formats that come close.
    """
    fitting = [name for name, format in FORMATS.items() if set(format.required) <= set(keys)]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")  # data sets often carry the rendered text beside the parts it was made from
    if len(fitting) == 1:
        return fitting[0]
    found = f"the keys found are {_list(keys)}"
    if fitting:
        raise UsageError(f"{found}, which fits {' and '.join(fitting)}; say which one is meant with 'format'.")
    close = [hint for name, format in FORMATS.items() if (hint := _explain_miss(name, format, keys))]
    known = close or [f"{name} has {_list(format.required)}" for name, format in FORMATS.items()]
    raise UsageError(f"{found}, which fits no format: {'; '.join(known)}. Rename the keys, or map them with 'columns'.")


def convert(record: Mapping[str, Any], format: str, where: str, fill: Mapping[str, str] | None = None) -> Conversation:
    """The conversation in a record of the given format; the same conversation is equal whatever its format.

    Args:
        where: file and line, for the errors and `Conversation.where`.
        fill: values for the placeholders ``{{name}}`` and ``{{author}}``, under the keys "name" and "author".

    Raises:
        UsageError: the record is malformed; the sentence begins with `where`.
        Dropped: an answer, a question or a text is empty.
    """
    rules = FORMATS[format]
    try:
        if missing := [key for key in rules.required if key not in record]:
            raise _Malformed(f"the format {format} needs {_list(missing)} too; the keys found are {_list(record)}")
        content = rules.read(record)
        if isinstance(content, str):
            conversation = Conversation(text=_fill(content, fill), where=where)
        else:
            messages = _place_system(_optional_text(record, "system") if "system" in rules.optional else "", content)
            _check_order(messages)
            filled = tuple(Message(message.role, _fill(message.content, fill)) for message in messages)
            conversation = Conversation(messages=filled, where=where)
    except _Malformed as error:
        raise UsageError(f"{where}: {error}.") from None
    _drop_if_empty(conversation)
    return conversation


def fill_placeholders(text: str, fill: Mapping[str, str] | None, where: str) -> str:
    """`text` with ``{{name}}`` and ``{{author}}`` replaced; a `UsageError` if there is nothing to fill one."""
    try:
        return _fill(text, fill)
    except _Malformed as error:
        raise UsageError(f"{where}: {error}.") from None


def _fill(text: str, fill: Mapping[str, str] | None) -> str:
    if fill:
        return _PLACEHOLDER.sub(lambda match: fill[match[1].lower()], text)
    if match := _PLACEHOLDER.search(text):
        raise _Malformed(
            f"the placeholder {match[0]} has to be filled; give both 'name' and 'author' with this source in the config"
        )
    return text


def _place_system(system: str, messages: list[Message]) -> list[Message]:
    """`messages` after the system prompt, if there is one; a blank system prompt counts as none."""
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    if not system.strip():
        return messages
    if messages and messages[0].role == "system":
        raise _Malformed("a system prompt stands both under 'system' and in the first message; keep one of them")
    return [Message("system", system), *messages]


def _check_order(messages: list[Message]) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise _Malformed("the conversation has no turns; a user's question and an assistant's answer are expected")
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            place = f"turn {number + 1} (without the system prompt)" if turns is not messages else f"turn {number + 1}"
            raise _Malformed(
                f"{place} is from '{message.role}' where '{expected}' is expected; "
                "user and assistant take turns, user first, after at most one system message"
            )
    if turns[-1].role != "assistant":
        raise _Malformed(
            f"the conversation ends with turn {len(turns)} from 'user'; an answer from 'assistant' is expected"
        )


def _drop_if_empty(conversation: Conversation) -> None:
    if conversation.text is not None and not conversation.text.strip():
        raise Dropped("empty text")
    for message in conversation.messages:
        if not message.content.strip():
            raise Dropped("empty answer" if message.role == "assistant" else "empty question")


# Reading the parts of a record. A key is written as a path, such as messages[2].content, so that errors can name it.


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _Malformed(f"'{key}' is {_kind(value)}, but text is expected")
    if match := _UNFIT.search(value):
        what = "a NUL character" if match[0] == "\x00" else f"half a surrogate pair (\\u{ord(match[0]):04x})"
        raise _Malformed(
            f"'{key}' holds {what} at position {match.start()}, which is no text; mend or remove the record"
        )
    return value


def _optional_text(record: Mapping[str, Any], key: str) -> str:
    # tables have to write null where a row has no value
    return "" if record.get(key) is None else _text(record[key], key)


def _list_of(value: Any, key: str, items: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Malformed(f"'{key}' is {_kind(value)}, but a list of {items} is expected")
    return value


def _part(value: Any, key: str, part: str) -> Any:
    """What an object has under `part`; `key` is the path of the object."""
    if not isinstance(value, Mapping):
        raise _Malformed(f"'{key}' is {_kind(value)}, but an object is expected")
    if part not in value:
        raise _Malformed(f"'{key}' has no '{part}'; its keys are {_list(value)}")
    return value[part]


def _messages(value: Any, key: str, roles: Mapping[str, Role], role_key: str, content_key: str) -> list[Message]:
    messages = []
    for number, item in enumerate(_list_of(value, key, "messages")):
        place = f"{key}[{number}]"
        role = _text(_part(item, place, role_key), f"{place}.{role_key}")
        if role not in roles:
            raise _Malformed(f"'{place}.{role_key}' is the unknown role '{role[:40]}'; known are {_list(roles)}")
        messages.append(Message(roles[role], _text(_part(item, place, content_key), f"{place}.{content_key}")))
    return messages


def _chat(record: Mapping[str, Any], key: str) -> list[Message]:
    return _messages(record[key], key, MESSAGE_ROLES, "role", "content")


def _exchange(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def _history(record: Mapping[str, Any]) -> list[Message]:
    if record.get("history") in (None, ""):  # a table's way of having none
        return []
    messages = []
    for number, pair in enumerate(_list_of(record["history"], "history", "[question, answer] pairs")):
        place = f"history[{number}]"
        if len(_list_of(pair, place, "a question and an answer")) != 2:
            raise _Malformed(f"'{place}' has {len(pair)} elements, but a question and an answer are expected")
        messages += _exchange(_text(pair[0], f"{place}[0]"), _text(pair[1], f"{place}[1]"))
    return messages


def _read_alpaca(record: Mapping[str, Any]) -> list[Message]:
    parts = [_text(record["instruction"], "instruction"), _optional_text(record, "input")]
    question = "\n".join(part for part in parts if part.strip())
    return _history(record) + _exchange(question, _text(record["output"], "output"))


def _read_sharegpt(record: Mapping[str, Any]) -> list[Message]:
    return _messages(record["conversations"], "conversations", SHAREGPT_ROLES, "from", "value")


def _read_messages(record: Mapping[str, Any]) -> list[Message]:
    return _chat(record, "messages")


def _read_prompt_completion(record: Mapping[str, Any]) -> list[Message]:
    roles: dict[str, Role] = {"prompt": "user", "completion": "assistant"}
    messages = []
    for key, role in roles.items():
        if not isinstance(record[key], str | list):
            raise _Malformed(f"'{key}' is {_kind(record[key])}, but text or a list of messages is expected")
        is_text = isinstance(record[key], str)
        messages += [Message(role, _text(record[key], key))] if is_text else _chat(record, key)
    return messages


def _read_query_response(record: Mapping[str, Any]) -> list[Message]:
    return _history(record) + _exchange(_text(record["query"], "query"), _text(record["response"], "response"))


def _read_xtuner(record: Mapping[str, Any]) -> list[Message]:
    messages = []
    for number, turn in enumerate(_list_of(record["conversation"], "conversation", "turns")):
        place = f"conversation[{number}]"
        question = _text(_part(turn, place, "input"), f"{place}.input")
        answer = _text(_part(turn, place, "output"), f"{place}.output")
        if turn.get("system") is not None and (system := _text(turn["system"], f"{place}.system")).strip():
            if number:
                raise _Malformed(f"'{place}.system' is given, but a system prompt belongs in the first turn only")
            messages.append(Message("system", system))
        messages += _exchange(question, answer)
    return messages


def _read_text(record: Mapping[str, Any]) -> str:
    return _text(record["text"], "text")


FORMATS: dict[str, Format] = {
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _read_alpaca),
    "sharegpt": Format(("conversations",), ("system",), _read_sharegpt),
    "messages": Format(("messages",), ("system",), _read_messages),
    "prompt_completion": Format(("prompt", "completion"), ("system",), _read_prompt_completion),
    "query_response": Format(("query", "response"), ("system", "history"), _read_query_response),
    "xtuner": Format(("conversation",), (), _read_xtuner),
    "text": Format(("text",), (), _read_text),
}


def _explain_miss(name: str, format: Format, keys: Collection[str]) -> str:
    """What a format lacks, if it comes close: a required key is there, or one that is spelt nearly like it."""
    missing = [key for key in format.required if key not in keys]
    near = {key: match[0] for key in missing if (match := difflib.get_close_matches(key, keys, n=1, cutoff=0.75))}
    if len(missing) == len(format.required) and not near:
        return ""
    parts = [f"'{key}'" + (f" (there is '{near[key]}')" if key in near else "") for key in missing]
    return f"{name} lacks {' and '.join(parts)}"


def _list(names: Collection[str]) -> str:
    shown = [f"'{name}'" for name in names][:12]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def _kind(value: Any) -> str:
    """A value's type in the words of JSON, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
