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
        reason = str(error).rstrip(".")
        raise UsageError(f"The model's chat template refuses a conversation of {roles}: {reason}.") from error
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the template has written all special tokens already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The token ids a model is given to answer `messages`: what chat and server feed, and what training trains on."""
    return tokenize(tokenizer, render_text(tokenizer, messages, for_answer=True))


def render_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], terminators: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The prompt of the last message (see `render_prompt`), and the token ids a model should produce for it.

    The answer is what the template adds to the prompt, with its end. What the template writes after the terminator is
    left out, since generation stops there. A template without a terminator gets the first of `terminators`, so that
    the end of an answer is always learnt.

    Raises:
        UsageError: the template refuses the messages, or changes the answer's text.
    """
    prompt = render_text(tokenizer, messages[:-1], for_answer=True)
    whole = render_text(tokenizer, messages, for_answer=False)
    prompt_ids, whole_ids = tokenize(tokenizer, prompt), tokenize(tokenizer, whole)
    if not whole.startswith(prompt):
        ids = tokenize(tokenizer, whole[_find_answer(tokenizer, messages, whole) :])
    elif whole_ids[: len(prompt_ids)] == prompt_ids:
        ids = whole_ids[len(prompt_ids) :]
    else:  # a token would span the border
        ids = tokenize(tokenizer, whole[len(prompt) :])
    ends = [position for position, token in enumerate(ids) if token in terminators]
    # a terminator in the answer's own text is not its end
    within = sum(token in terminators for token in tokenize(tokenizer, messages[-1].content))
    return prompt_ids, ids[: ends[within] + 1] if len(ends) > within else [*ids, terminators[0]]


def _find_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], whole: str) -> int:
    """Where the last message's text begins in `whole`, for templates that write an answer otherwise than they open one.

    (As some do with their thinking marks.)
    """
    mark = "\ue000"  # a private character: the text of an answer may also stand elsewhere
    marked = render_text(tokenizer, [*messages[:-1], Message("assistant", mark)], for_answer=False)
    at = marked.rfind(mark)
    content = messages[-1].content
    if at < 0 or not (whole.startswith(content, at) or whole.startswith(content.strip(), at)):
        raise UsageError("The model's chat template changes the text of an answer, so it cannot be trained on.")
    return at
