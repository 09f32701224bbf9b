"""The formats of chats: for each a function that reads a record's messages. What all of them share is in `formats`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lory.data.records.fields import (
    Malformed,
    ReadOptions,
    check_list,
    check_text,
    is_blank,
    kind_of,
    optional_text,
    part,
)
from lory.data.records.messages import OPENAI, SHAREGPT, read_messages
from lory.types import Conversation, Message


def read_alpaca(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """Stanford Alpaca's instruction, input and output; with `history` as LLaMA-Factory has it."""
    answer = Message("assistant", check_text(record["output"], "output"))
    return Conversation((*read_history(record), Message("user", read_instruction(record)), answer))


def read_instruction(record: Mapping[str, Any]) -> str:
    """The instruction with its input below it."""
    instruction, extra = check_text(record["instruction"], "instruction"), optional_text(record, "input")
    if is_blank(extra):
        return instruction
    return extra if is_blank(instruction) else f"{instruction}\n{extra}"


def read_history(record: Mapping[str, Any]) -> list[Message]:
    """The exchanges before the last question, a list of pairs."""
    if record.get("history") in (None, ""):  # a table's way of having none
        return []
    messages: list[Message] = []
    for number, pair in enumerate(check_list(record["history"], "history", "[question, answer] pairs")):
        place = f"history[{number}]"
        if len(check_list(pair, place, "a question and an answer")) != 2:
            raise Malformed(f"'{place}' has {len(pair)} elements, but a question and an answer are expected")
        messages += _exchange(check_text(pair[0], f"{place}[0]"), check_text(pair[1], f"{place}[1]"))
    return messages


def _exchange(question: str, answer: str, weight: float | None = None) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer, weight=weight)


def read_sharegpt(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """A list of ``{"from": "human" or "gpt", "value": ...}``, also LLaVA's and LLaMA-Factory's."""
    return Conversation(tuple(read_messages(record["conversations"], "conversations", SHAREGPT, record, options)))


def read_openai(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """A list of ``{"role": ..., "content": ...}``."""
    return Conversation(tuple(read_messages(record["messages"], "messages", OPENAI, record, options)))


def read_prompt_completion(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """TRL's pair of texts, or of lists of messages."""
    messages: list[Message] = []
    for key, speaker in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        if isinstance(value, str):
            messages.append(Message(OPENAI.speakers[speaker], check_text(value, key)))
        elif isinstance(value, list):
            messages += read_messages(value, key, OPENAI, record, options)
        else:
            raise Malformed(f"'{key}' is {kind_of(value)}, but text or a list of messages is expected")
    return Conversation(tuple(messages))


def read_query_response(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """ms-swift's query and response, with `history`."""
    last = _exchange(check_text(record["query"], "query"), check_text(record["response"], "response"))
    return Conversation((*read_history(record), *last))


def read_xtuner(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """A list of exchanges: XTuner's ``{"system", "input", "output"}`` or ms-swift's ``{"human", "assistant"}``."""
    messages: list[Message] = []
    for number, turn in enumerate(check_list(record["conversation"], "conversation", "turns")):
        place = f"conversation[{number}]"
        by_role = isinstance(turn, Mapping) and "input" not in turn and ("human" in turn or "user" in turn)
        ask, answer = ("human" if "human" in turn else "user", "assistant") if by_role else ("input", "output")
        question = check_text(part(turn, place, ask), f"{place}.{ask}")
        reply = check_text(part(turn, place, answer), f"{place}.{answer}")
        if not is_blank(system := optional_text(turn, "system", f"{place}.")):
            if number:
                raise Malformed(f"'{place}.system' is given, but a system prompt belongs in the first turn only")
            messages.append(Message("system", system))
        learnt = turn.get("output_with_loss")
        if learnt not in (None, False, True):
            raise Malformed(f"'{place}.output_with_loss' is {kind_of(learnt)}, but true or false is expected")
        messages += _exchange(question, reply, None if learnt is None or learnt else 0.0)
    return Conversation(tuple(messages))


def read_image_text(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """An image and what is written on it, asked with `options.question`, which may hold the mark ``<image>``."""
    question = options.question if "<image>" in options.question else f"<image>{options.question}"
    return Conversation(_exchange(question, check_text(record["text"], "text")))


def read_e2e(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """A line of the E2E NLG challenge as it goes with LoRA's paper: ``meaning representation||text``."""
    meaning, bars, text = check_text(record["text"], "text").partition("||")
    if not bars:
        raise Malformed("'text' has no '||', but a meaning representation, '||' and a text are expected")
    return Conversation(_exchange(meaning.strip(), text.strip()))


def read_text(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """Plain text to continue."""
    return Conversation(text=check_text(record["text"], "text"))
