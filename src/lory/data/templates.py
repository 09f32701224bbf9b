"""Rendering messages with the tokenizer's own chat template: the one place, for training, chat and server alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lory.runtime import UsageError
from lory.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_answer: bool) -> str:
    """The conversation as the template writes it; with `for_answer` it ends where the assistant is to speak.

    transformers runs templates in jinja's sandbox.

    Raises:
        UsageError: the tokenizer has no template, or the template refuses these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot render messages."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [message.to_dict() for message in messages], tokenize=False, add_generation_prompt=for_answer
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise UsageError(f"The model's chat template refuses a conversation of {roles}: {error}.") from error
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the template has written all special tokens already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The token ids a model is given to answer `messages`: what chat and server feed, and what training trains on."""
    return tokenize(tokenizer, render_text(tokenizer, messages, for_answer=True))


def render_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], terminators: Sequence[int]
) -> list[int]:
    """The token ids a model should produce for the last message: what the template adds to the prompt, with its end.

    What the template writes after the terminator is left out, since generation stops there. A template without a
    terminator gets the tokenizer's end of sequence, so that the end of an answer is always learnt.
    """
    prompt = render_text(tokenizer, messages[:-1], for_answer=True)
    whole = render_text(tokenizer, messages, for_answer=False)
    if whole.startswith(prompt):
        added = whole[len(prompt) :]
    else:
        # the template writes a finished answer otherwise than it opens one (as some do with their thinking marks)
        content = messages[-1].content.strip()
        at = whole.rfind(content)
        if at < 0:
            raise UsageError(
                f"The chat template of {tokenizer.name_or_path} changes an answer's text; lory cannot train on that."
            )
        added = whole[at:]
    ids = tokenize(tokenizer, added)
    ends = [position for position, token in enumerate(ids) if token in terminators]
    return ids[: ends[-1] + 1] if ends else [*ids, terminators[0]]
