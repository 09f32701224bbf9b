"""Formats: a record out of a file, whatever its shape, becomes a `Conversation`. Nothing downstream knows a format.

A format is a function that reads its records and one line in `FORMATS`. What all chats may have besides their messages
(a system prompt, tools, media, a rejected answer, a label) is read here, for all of them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lory.data.records import chats
from lory.data.records.fields import (
    Dropped,
    Malformed,
    ReadOptions,
    check_text,
    is_blank,
    optional_text,
    quote_all,
    read_label,
)
from lory.data.records.labelled import TEXT_COLUMNS, read_classification
from lory.data.records.media import COLUMNS, has_columns, place_columns
from lory.data.records.messages import OPENAI, check_order, check_weight, read_messages
from lory.data.records.preferences import PROMPT_KEYS, join_pair, read_preference, split_pair
from lory.data.records.tools import read_tools
from lory.runtime import UsageError
from lory.types import Conversation, Message

CHAT_KEYS = ("system", "tools", *COLUMNS, "rejected_response", "rejected_messages", "label", "loss_scale", "objects")
"""What a record of any chat format may have beside its own keys."""

_CHAT_KEYS = frozenset(CHAT_KEYS)
_NO_OPTIONS = ReadOptions()
# only these two can be filled, and only without spaces: `{{ name }}` is at home in Jinja and Vue code
_PLACEHOLDER = re.compile(r"\{\{(name|author)\}\}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Format:
    """The keys of a record, and the function that reads them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], ReadOptions], Conversation]
    """Gives what the format's own keys say; `convert` does the rest."""
    rank: int = 2
    """Of several formats whose keys are there, the highest rank is meant."""
    either: tuple[tuple[str, ...], ...] = ()
    """Of these sets of keys, one has to be there, too."""
    automatic: bool = True
    """Whether the keys alone tell the format."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that the format reads."""
        return tuple(dict.fromkeys([*self.required, *(key for keys in self.either for key in keys), *self.optional]))

    def fits(self, keys: Collection[str]) -> bool:
        """Whether all that it needs is among the keys."""
        for key in self.required:
            if key not in keys:
                return False
        return not self.either or any(all(key in keys for key in choice) for choice in self.either)


FORMATS: dict[str, Format] = {
    "alpaca": Format(("instruction", "output"), ("input", "history", *CHAT_KEYS), chats.read_alpaca),
    "sharegpt": Format(("conversations",), CHAT_KEYS, chats.read_sharegpt),
    "messages": Format(("messages",), CHAT_KEYS, chats.read_openai),
    "prompt_completion": Format(("prompt", "completion"), CHAT_KEYS, chats.read_prompt_completion),
    "query_response": Format(("query", "response"), ("history", *CHAT_KEYS), chats.read_query_response),
    "xtuner": Format(("conversation",), CHAT_KEYS, chats.read_xtuner),
    "preference": Format(
        ("chosen", "rejected"), (*PROMPT_KEYS, "input", "history", *CHAT_KEYS), read_preference, rank=3
    ),
    "image_text": Format(("image", "text"), CHAT_KEYS, chats.read_image_text, rank=1),
    "classification": Format(("label",), (), read_classification, rank=1, either=TEXT_COLUMNS),
    "e2e": Format(("text",), CHAT_KEYS, chats.read_e2e, automatic=False),
    "text": Format(("text",), (), chats.read_text, rank=0),
}


def recognise(keys: Collection[str]) -> str:
    """The name of the format whose keys are among `keys`; given a whole record, keys of nulls count as missing.

    Data sets often carry the rendered text beside the parts it was made from, or an answer beside a preference pair:
    the richer format is meant then.

    Raises:
        UsageError: no format fits, or several do; the sentence lists the keys and the formats that come close.
    """
    # a label may well be null, in a set for testing
    filled = [key for key in keys if keys[key] is not None or key == "label"] if isinstance(keys, Mapping) else keys
    fitting = _find_fitting(filled) or _find_fitting(keys)
    if len(fitting) == 1:
        return fitting[0]
    found = f"the keys found are {quote_all(keys)}"
    if fitting:
        raise UsageError(f"{found}, which fits {' and '.join(fitting)}; say which one is meant with 'format'.")
    automatic = {name: format for name, format in FORMATS.items() if format.automatic}
    close = [hint for name, format in automatic.items() if (hint := _explain_miss(name, format, keys))]
    known = close or [f"{name} has {quote_all(format.required)}" for name, format in automatic.items()]
    raise UsageError(f"{found}, which fits no format: {'; '.join(known)}. Rename the keys, or map them with 'columns'.")


def _find_fitting(keys: Collection[str]) -> list[str]:
    fitting = [name for name, format in FORMATS.items() if format.automatic and format.fits(keys)]
    highest = max((FORMATS[name].rank for name in fitting), default=0)
    return [name for name in fitting if FORMATS[name].rank == highest]


def _explain_miss(name: str, format: Format, keys: Collection[str]) -> str:
    """What a format lacks, if it comes close: a needed key is there, or one that is spelt nearly like it."""
    missing = [key for key in format.required if key not in keys]
    near = {key: match[0] for key in missing if (match := difflib.get_close_matches(key, keys, n=1, cutoff=0.75))}
    has_choice = any(all(key in keys for key in choice) for choice in format.either)
    if len(missing) == len(format.required) and not near and not has_choice:
        return ""
    parts = [f"'{key}'" + (f" (there is '{near[key]}')" if key in near else "") for key in missing]
    if format.either and not has_choice:
        parts.append(_quote_choices(format.either))
    return f"{name} lacks {' and '.join(parts)}"


def _quote_choices(either: tuple[tuple[str, ...], ...]) -> str:
    return " or ".join("+".join(f"'{key}'" for key in choice) for choice in either)


def convert(
    record: Mapping[str, Any],
    format: str,
    where: str,
    fill: Mapping[str, str] | None = None,
    options: ReadOptions = _NO_OPTIONS,
) -> Conversation:
    """The conversation in a record of the given format; the same conversation is equal whatever its format.

    Args:
        where: file and line, for the errors and `Conversation.where`.
        fill: values for the placeholders ``{{name}}`` and ``{{author}}``, under the keys "name" and "author".

    Raises:
        UsageError: the record is malformed; the sentence begins with `where`.
        Dropped: an answer, a question or a text is empty, a label is missing, or a pair has nothing to prefer.
    """
    rules = FORMATS[format]
    try:
        if not rules.fits(record):
            raise Malformed(_explain_lack(format, rules, record))
        content = rules.read(record, options)
        if content.text is None:
            content = _finish_chat(record, content, where, fill, options)
        else:
            content = replace(content, text=_fill(content.text, fill), where=where)
    except Malformed as error:
        raise UsageError(f"{where}: {error}.") from None
    _drop_if_empty(content)
    return content


def _explain_lack(name: str, format: Format, record: Mapping[str, Any]) -> str:
    missing = [key for key in format.required if key not in record]
    lack = quote_all(missing) if missing else _quote_choices(format.either)
    return f"the format {name} needs {lack} too; the keys found are {quote_all(record)}"


def fill_placeholders(text: str, fill: Mapping[str, str] | None, where: str) -> str:
    """`text` with ``{{name}}`` and ``{{author}}`` replaced; a `UsageError` if there is nothing to fill one."""
    try:
        return _fill(text, fill)
    except Malformed as error:
        raise UsageError(f"{where}: {error}.") from None


def _fill(text: str, fill: Mapping[str, str] | None) -> str:
    if "{{" not in text:
        return text
    if fill:
        return _PLACEHOLDER.sub(lambda match: fill[match[1].lower()], text)
    if match := _PLACEHOLDER.search(text):
        raise Malformed(
            f"the placeholder {match[0]} has to be filled; give both 'name' and 'author' with this source in the config"
        )
    return text


def _fill_all(messages: Collection[Message], fill: Mapping[str, str] | None) -> tuple[Message, ...]:
    return tuple(
        replace(message, content=_fill(message.content, fill), reasoning=_fill(message.reasoning, fill))
        if "{{" in message.content or "{{" in message.reasoning
        else message
        for message in messages
    )


def _finish_chat(
    record: Mapping[str, Any],
    chat: Conversation,
    where: str,
    fill: Mapping[str, str] | None,
    options: ReadOptions,
) -> Conversation:
    """The chat with what the record has under `CHAT_KEYS`, in the order that a conversation has, and filled."""
    label, tools, system = None, "", ""
    if not _CHAT_KEYS.isdisjoint(record):
        if record.get("objects"):
            raise Malformed(
                "'objects' holds boxes, which have no place in lory; write them into the texts as the model does"
            )
        system, tools = optional_text(record, "system"), read_tools(record.get("tools"), "tools")
        chat = _read_rejected(record, chat, options)
        if record.get("loss_scale") is not None:
            chat = replace(chat, messages=_scale(record["loss_scale"], chat.messages))
        if has_columns(record):
            placed = tuple(place_columns(record, [*chat.messages, *chat.rejected], options))
            count = len(chat.messages)
            chat = replace(chat, messages=placed[:count], rejected=placed[count:])
        label = _read_verdict(record.get("label"))
    messages = _place_system(system, chat.messages)
    if "label" in record and messages and messages[-1].role == "user":
        if (label := read_label(record["label"], "label")) is None:
            raise Dropped("no label")
        return Conversation(text=_fill(_classified_text(messages), fill), label=label, where=where)
    check_order(messages)
    if chat.rejected:
        check_order((*messages[:-1], *chat.rejected))
    return Conversation(
        messages=_fill_all(messages, fill),
        tools=tools,
        rejected=_fill_all(chat.rejected, fill),
        label=label,
        where=where,
    )


def _place_system(system: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` after the system prompt, if there is one; a blank system prompt counts as none."""
    if messages and messages[0].role == "system" and is_blank(messages[0].content):
        messages = messages[1:]
    if is_blank(system):
        return messages
    if messages and messages[0].role == "system":
        raise Malformed("a system prompt stands both under 'system' and in the first message; keep one of them")
    return (Message("system", system), *messages)


def _read_rejected(record: Mapping[str, Any], chat: Conversation, options: ReadOptions) -> Conversation:
    """ms-swift's ways to write a worse answer: the text alone, or the whole conversation with it."""
    if record.get("rejected_response") is not None:
        rejected = [Message("assistant", check_text(record["rejected_response"], "rejected_response"))]
        return join_pair(chat.messages[:-1], chat.messages[-1:], rejected, "the conversation")
    if (whole := record.get("rejected_messages")) is not None:
        key = "rejected_messages"
        rejected = read_messages(whole, key, OPENAI, record, options)
        return split_pair(chat.messages, tuple(rejected), "messages", key)
    return chat


def _scale(scale: Any, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """ms-swift's `loss_scale` of a whole record, where a message does not say otherwise: a strategy, or a number."""
    answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
    if scale == "default":
        weights: dict[int, float] = {}
    elif scale == "last_round":
        weights = {at: float(at == answers[-1]) for at in answers}
    elif scale == "all":
        weights = dict.fromkeys(range(len(messages)), 1.0)
    elif isinstance(scale, str):
        raise Malformed(f"'loss_scale' is '{scale[:40]}', but 'default', 'last_round', 'all' or a number is expected")
    else:
        weights = dict.fromkeys(answers, check_weight(scale, "loss_scale"))
    return tuple(
        replace(message, weight=weights[at]) if at in weights and message.weight is None else message
        for at, message in enumerate(messages)
    )


def _read_verdict(value: Any) -> str | None:
    """Whether the answer is a wanted one, as data for KTO say; other labels of a chat say nothing about learning it."""
    word = str(value).lower() if isinstance(value, bool | str) else ""
    return word if word in ("true", "false") else None


def _classified_text(messages: tuple[Message, ...]) -> str:
    """The text that a label belongs to, where ms-swift writes it as a user's message without an answer."""
    if len(messages) > 1 or messages[0].media:
        raise Malformed("a 'label' without an answer belongs to one user's message of text; join the messages into one")
    return messages[0].content


def _drop_if_empty(conversation: Conversation) -> None:
    if conversation.text is not None:
        if is_blank(conversation.text):
            raise Dropped("empty text")
        return
    for message in (*conversation.messages, *conversation.rejected):
        if is_blank(message.content) and not message.tool_calls:
            if message.role == "assistant":
                raise Dropped("empty answer")
            if message.role == "user":
                raise Dropped("empty question")


def explain(
    record: Mapping[str, Any],
    format: str = "auto",
    fill: Mapping[str, str] | None = None,
    options: ReadOptions = _NO_OPTIONS,
) -> str:
    """What was found in a record and how it is read, in a few lines for a person; also when it cannot be read."""
    try:
        name = recognise(record) if format == "auto" else format
        conversation = convert(record, name, "This record", fill, options)
    except UsageError as error:
        return str(error)
    except Dropped as drop:
        return f"read as {name}, and left out: {drop.reason}"
    used = [key for key in record if key in FORMATS[name].keys]
    unused = [key for key in record if key not in FORMATS[name].keys]
    lines = [f"read as {name}, from {quote_all(used)}" + (f"; not used: {quote_all(unused)}" if unused else "")]
    if conversation.text is not None:
        lines.append(f"text: {_preview(conversation.text)}")
        if conversation.text_pair:
            lines.append(f"second text: {_preview(conversation.text_pair)}")
    lines += [_explain_message(message) for message in conversation.messages]
    lines += [f"rejected {_explain_message(message)}" for message in conversation.rejected]
    if conversation.tools:
        names = [tool["function"]["name"] for tool in json.loads(conversation.tools)]
        lines.append(f"tools: {', '.join(names)}")
    if conversation.label is not None:
        lines.append(f"label: {conversation.label}")
    return "\n".join(lines)


def _explain_message(message: Message) -> str:
    facts = [_preview(message.content)]
    if message.reasoning:
        facts.append(f"reasoning {_preview(message.reasoning)}")
    facts += [f"calls {call.name}({_shorten(call.arguments)})" for call in message.tool_calls]
    facts += [f"{media.kind} {_shorten(media.source)}" for media in message.media]
    if message.weight is not None:
        facts.append(f"weight {message.weight:g}")
    return f"{message.role}: {', '.join(facts)}"


def _preview(text: str) -> str:
    return f"{json.dumps(_shorten(text), ensure_ascii=False)} ({len(text)} character{'s' if len(text) != 1 else ''})"


def _shorten(value: str | bytes, length: int = 60) -> str:
    if isinstance(value, bytes):
        return f"of {len(value)} bytes"
    return value if len(value) <= length else f"{value[: length - 1]}…"
