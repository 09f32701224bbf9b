"""Preference pairs: a prompt, the better answer, and the worse one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lory.data.records.chats import read_history, read_instruction
from lory.data.records.fields import Dropped, Malformed, ReadOptions, check_text, kind_of
from lory.data.records.messages import OPENAI, read_message, read_messages
from lory.types import Conversation, Message, Role

PROMPT_KEYS = ("prompt", "instruction", "query", "question", "conversations", "messages")
"""Where the prompt of a pair is looked for, in this order."""

# Anthropic's helpful-harmless pairs are dialogues in one text
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def read_preference(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """`chosen` and `rejected`, each a text, a message, or a list of messages.

    Answers alone need a prompt beside them. Two whole conversations (TRL's implicit prompt) share their beginning, and
    stand for themselves: a prompt in text beside them only repeats it.
    """
    chosen, rejected = (_read_side(record, key, options) for key in ("chosen", "rejected"))
    whole = [bool(side) and side[0].role in ("system", "user") for side in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise Malformed("one of 'chosen' and 'rejected' is a whole conversation, but the other is an answer alone")
    if whole[0]:
        conversation = split_pair(chosen, rejected, "chosen", "rejected")
        prompt = _read_prompt(record, options) if isinstance(record.get("prompt"), list) else []
        if prompt != chosen[: len(prompt)]:
            raise Malformed("'chosen' is a whole conversation, but it does not begin with the messages in 'prompt'")
        return conversation
    if not (prompt := _read_prompt(record, options)):
        raise Malformed("'chosen' is an answer alone, but there is no prompt; give it under 'prompt'")
    return join_pair(prompt, chosen, rejected, "chosen")


def join_pair(
    prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message], key: str
) -> Conversation:
    """The conversation of a prompt and two answers; `key` is where the better one was found."""
    if len(chosen) != 1:
        raise Malformed(f"'{key}' has {len(chosen)} messages, but one answer is expected")
    if not rejected:
        raise Malformed(f"there is no answer that is worse than the one in '{key}'; one is expected")
    if list(chosen) == list(rejected):
        raise Dropped("chosen and rejected are the same")
    return Conversation((*prompt, *chosen), rejected=tuple(rejected))


def split_pair(chosen: Sequence[Message], rejected: Sequence[Message], key: str, other: str) -> Conversation:
    """The conversation of two that begin alike.

    Raises:
        Dropped: they are the same, or differ before the last answer, so that they do not share a prompt.
    """
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same < len(chosen) - 1:
        raise Dropped(f"{key} and {other} differ before the last answer")
    if same == len(chosen) < len(rejected):
        raise Malformed(f"'{other}' only goes on where '{key}' ends, but another answer is expected")
    return join_pair(chosen[: len(chosen) - 1], chosen[-1:], rejected[len(chosen) - 1 :], key)


def _read_side(record: Mapping[str, Any], key: str, options: ReadOptions) -> list[Message]:
    value = record[key]
    if isinstance(value, str):
        text = check_text(value, key)
        return _parse_dialogue(text) if _SPEAKER.match(text) else [Message("assistant", text)]
    if isinstance(value, Mapping):
        return [read_message(value, key, OPENAI, record, options)]
    if isinstance(value, list):
        return read_messages(value, key, OPENAI, record, options)
    raise Malformed(f"'{key}' is {kind_of(value)}, but text, a message or a list of messages is expected")


def _parse_dialogue(text: str) -> list[Message]:
    pieces = _SPEAKER.split(text)[1:]
    return [
        Message(_SPEAKERS[speaker], content.strip()) for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _read_prompt(record: Mapping[str, Any], options: ReadOptions) -> list[Message]:
    key = next((key for key in PROMPT_KEYS if record.get(key) is not None), None)
    if key is None:
        return []
    value = record[key]
    if isinstance(value, list):
        return read_messages(value, key, OPENAI, record, options)
    text = read_instruction(record) if key == "instruction" else check_text(value, key)
    return [*read_history(record), Message("user", text)]
