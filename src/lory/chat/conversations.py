"""Conversations in files: OpenAI's messages as JSON or JSONL, and questions in plain text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory.chat.pictures import MARK, Picture, open_picture
from lory.data.records.fields import Malformed, ReadOptions, check_text
from lory.data.records.media import has_columns, place_columns
from lory.data.records.messages import OPENAI, check_order, read_messages
from lory.runtime import UsageError, explain_os_error, write_text
from lory.types import Message

KINDS = (".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class Talk:
    """A conversation out of a file."""

    where: str
    """File and line."""
    messages: tuple[Message, ...]
    """Up to the last question."""
    answer: Message | None = None
    """The answer to it, where the file has one."""


def read_talks(path: Path) -> list[Talk]:
    """The conversations in a file, or the questions: one a line in .txt, and in .jsonl as texts or ``{"prompt": ...}``.

    Raises:
        UsageError: there is no such file, it is empty, or something in it is no conversation.
    """
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path} was given; a file of conversations is called {', '.join(KINDS)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text; save it as that.") from error
    except OSError as error:
        raise UsageError(f"{path} could not be read: {error.strerror}.") from error
    talks = [_read_talk(value, where, path.absolute().parent) for where, value in _list_values(path, text)]
    if not talks:
        raise UsageError(f"{path} is empty; one question or conversation at least is expected.")
    return talks


def _list_values(path: Path, text: str) -> list[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text) if text.strip() else []
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON: {error}.") from error
        several = isinstance(value, list) and not all(isinstance(item, dict) and "role" in item for item in value)
        return [(f"{path}, record {at}", item) for at, item in enumerate(value, 1)] if several else [(str(path), value)]
    values: list[tuple[str, Any]] = []
    # not splitlines, which also takes characters inside of a text for ends of lines
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if line.strip():
            values.append((where, line.strip() if path.suffix.lower() == ".txt" else _parse(line, where)))
    return values


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}.") from error


def _read_talk(value: Any, where: str, root: Path) -> Talk:
    try:
        messages = _read_messages(value, ReadOptions(str(root)))
        last = messages[-1]
        check_order(messages if last.role == "assistant" else [*messages, Message("assistant", "")])
    except Malformed as error:
        raise UsageError(f"{where}: {error}.") from None
    if any(message.tool_calls or message.role == "tool" for message in messages):
        raise UsageError(f"{where} calls tools, which a chat here has none of; leave it out.")
    if last.role == "assistant":
        return Talk(where, tuple(messages[:-1]), last)
    return Talk(where, tuple(messages))


def _read_messages(value: Any, options: ReadOptions) -> list[Message]:
    """The messages of a text, of ``{"prompt": ...}``, of a list of messages, or of a record that has one."""
    if isinstance(value, Mapping) and "messages" not in value and "prompt" in value:
        value = {**{key: item for key, item in value.items() if key != "prompt"}, "messages": value["prompt"]}
    record = value if isinstance(value, Mapping) else {"messages": value}
    content = record.get("messages")
    if isinstance(content, str):
        messages = [Message("user", check_text(content, "the question"))]
    elif isinstance(content, list) and content:
        messages = read_messages(content, "messages", OPENAI, record, options)
    else:
        raise Malformed('a question, or messages as in {"messages": [{"role": "user", "content": ...}]}, is expected')
    return place_columns(record, messages, options) if has_columns(record) else messages


def to_turns(messages: Sequence[Message], root: Path) -> list[dict[str, Any]]:
    """Messages as `Session.history` has them, their images opened.

    Raises:
        UsageError: an image cannot be opened, or a message has a sound or a video.
    """
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.media:
            turn["images"] = tuple(_open(media.kind, media.source, root) for media in message.media)
        turns.append(turn)
    return turns


def _open(kind: str, source: str | bytes, root: Path) -> Picture:
    if kind != "image":
        raise UsageError(f"The conversation has {kind}s in it; only images can be shown to a model here.")
    return open_picture(source, root)


def to_openai(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn of a history in OpenAI's form, its images as data URLs."""
    if not turn.get("images"):
        return {"role": turn["role"], "content": turn["content"]}
    images = iter(turn["images"])
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(turn["content"].split(MARK)):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": next(images).data_url}})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": turn["role"], "content": parts}


def save_conversation(messages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write turns of a history as ``{"messages": [...]}``: .json is replaced, and to .jsonl a line is added.

    Raises:
        UsageError: the file is called otherwise.
        LoryError: it cannot be written.
    """
    record = {"messages": [to_openai(message) for message in messages]}
    if path.suffix.lower() == ".json":
        write_text(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")
        return
    if path.suffix.lower() != ".jsonl":
        raise UsageError(f"'{path}' was given; a conversation is saved in a file called .json or .jsonl.")
    try:
        with path.open("a+b") as file:
            # a line that something else left open must not swallow this one
            if file.tell() and not _ends_line(file):
                file.write(b"\n")
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise explain_os_error(error, f"write {path}") from error


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
