"""Rendering messages with the tokenizer's own chat template: the one place, for training, chat and server alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from lory.runtime import UsageError
from lory.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000"
"""A private character that stands for a text whose place in a rendered conversation is looked for."""

Finish = Callable[[int, str, str], tuple[str, str]]
"""Given a turn's number, its rendered prompt, and that with the answer: both as they are to be tokenized."""

NO_TEMPLATE = "has no chat template"
"""What the error says of a tokenizer that messages cannot be rendered with."""

_FEW_TEXTS = 16
_NUMBER = re.compile(r"\d+")
_NO_CALLS = (
    "The model's chat template leaves out the call of '{}'; take a template that writes tool calls, such as hermes."
)


class RefusedTurn(UsageError):
    """A turn that `render_turns` could not render; `index` is its position among those that were given."""

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(reason)
        self.index = index

    @property
    def reason(self) -> str:
        """The problem without numbers, so that like ones can be counted."""
        return _NUMBER.sub("#", str(self)).rstrip(".")[:160]


def render_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_answer: bool, tools: str = ""
) -> str:
    """The conversation as the template writes it; with `for_answer` it ends where the assistant is to speak.

    transformers runs templates in jinja's sandbox.

    Args:
        tools: the functions that the assistant may call, as `Conversation.tools` has them.

    Raises:
        UsageError: the tokenizer has no template, or the template refuses these messages or leaves out the tools.
    """
    return _render_all(tokenizer, [messages], for_answer, tools)[0]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the template has written all special tokens already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: str = "") -> list[int]:
    """The token ids a model is given to answer `messages`: what chat and server feed, and what training trains on."""
    return tokenize(tokenizer, render_text(tokenizer, messages, for_answer=True, tools=tools))


def render_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], terminators: Sequence[int], tools: str = ""
) -> tuple[list[int], list[int]]:
    """The prompt of the last message (see `render_prompt`), and the token ids a model should produce for it.

    The answer is what the template adds to the prompt, with its end. What the template writes after the terminator is
    left out, since generation stops there. A template without a terminator gets the first of `terminators`, so that
    the end of an answer is always learnt.

    Raises:
        UsageError: the template refuses the messages, changes the answer's text, or leaves out its reasoning or calls.
    """
    return render_turns(tokenizer, [messages], terminators, [tools])[0]


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Sequence[Message]],
    terminators: Sequence[int],
    tools: Sequence[str] | None = None,
    finish: Finish | None = None,
) -> list[tuple[list[int], list[int]]]:
    """What `render_turn` gives for each of `turns`, in less than half of the time from some dozens on.

    Args:
        turns: for each turn, its conversation up to and with the answer.
        tools: for each turn, the functions that may be called; None: there are none.
        finish: puts the placeholders of images into the texts.

    Raises:
        RefusedTurn: one that cannot be rendered, for a reason of `render_turn`.
    """
    texts = _render_turn_texts(tokenizer, turns, tools or [""] * len(turns))
    if finish is not None:
        texts = [finish(number, prompt, whole) for number, (prompt, whole) in enumerate(texts)]
    ids = tokenize_all(tokenizer, chain.from_iterable(texts))
    prompts, wholes = ids[::2], ids[1::2]
    # where a token would span the border, the answer is tokenized alone
    spanning = [
        number
        for number, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True))
        if whole[: len(prompt)] != prompt
    ]
    alone = tokenize_all(tokenizer, (texts[number][1][len(texts[number][0]) :] for number in spanning))
    answers = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
    for number, answer in zip(spanning, alone, strict=True):
        answers[number] = answer
    marks = [tokenizer.decode([token]) for token in terminators]
    return [
        (prompt, _end(answer, _count_own_ends(tokenizer, messages[-1], terminators, marks), terminators))
        for prompt, answer, messages in zip(prompts, answers, turns, strict=True)
    ]


def _end(ids: list[int], own_ends: int, terminators: Sequence[int]) -> list[int]:
    """The answer up to the terminator that comes after the `own_ends` of its own text."""
    ends = [position for position, token in enumerate(ids) if token in terminators]
    return ids[: ends[own_ends] + 1] if len(ends) > own_ends else [*ids, terminators[0]]


def _count_own_ends(
    tokenizer: PreTrainedTokenizerBase, answer: Message, terminators: Sequence[int], marks: Sequence[str]
) -> int:
    """How many terminators stand in the answer's own text; they are not its end."""
    own = [answer.reasoning, answer.content, *(call.arguments for call in answer.tool_calls)]
    own = [text for text in own if any(mark in text for mark in marks)]
    return sum(token in terminators for text in own for token in tokenize(tokenizer, text))


def _render_turn_texts(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Sequence[Message]], tools: Sequence[str]
) -> list[tuple[str, str]]:
    """For each turn its prompt, and the prompt with the answer: the second begins with the first."""
    texts: list[tuple[str, str]] = [("", "")] * len(turns)
    for functions in dict.fromkeys(tools):
        numbers = [number for number, own in enumerate(tools) if own == functions]
        chosen = [turns[number] for number in numbers]
        try:
            prompts = _render_all(tokenizer, [messages[:-1] for messages in chosen], True, functions)
            wholes = _render_all(tokenizer, chosen, False, functions)
        except UsageError as error:
            if len(turns) == 1:
                raise RefusedTurn(str(error), 0) from error
            # one by one, to find out which it was
            return [_render_numbered(tokenizer, *turn) for turn in zip(turns, tools, range(len(turns)), strict=True)]
        for number, prompt, whole in zip(numbers, prompts, wholes, strict=True):
            try:
                texts[number] = prompt, _join(tokenizer, turns[number], prompt, whole, functions)
            except UsageError as error:
                raise RefusedTurn(str(error), number) from error
    return texts


def _render_numbered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: str, number: int
) -> tuple[str, str]:
    try:
        return _render_turn_texts(tokenizer, [messages], [tools])[0]
    except RefusedTurn as error:
        raise RefusedTurn(str(error), number) from error


def _join(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, whole: str, tools: str) -> str:
    """The prompt and what the template writes for the answer to it."""
    if not whole.startswith(prompt):
        # some templates write an answer otherwise than they open one, as with their thinking marks
        whole = prompt + whole[_find_answer(tokenizer, messages, whole, tools) :]
    answer, written = messages[-1], whole[len(prompt) :]
    if answer.reasoning and answer.reasoning.strip() not in written:
        raise UsageError(
            "The model's chat template leaves out the reasoning of an answer that is to be learnt; take a template "
            "that writes reasoning_content, or put the reasoning into the answer's text."
        )
    if lost := next((call.name for call in answer.tool_calls if call.name not in written), None):
        raise UsageError(_NO_CALLS.format(lost))
    # a template may set thinking that stands inside the text apart from it
    if answer.content.strip() not in written and not answer.media and "</think>" not in answer.content:
        raise UsageError("The model's chat template changes the text of an answer, so it cannot be trained on.")
    return whole


def _find_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], whole: str, tools: str) -> int:
    """Where what the assistant says last begins in `whole`: its reasoning, else its text, else its calls.

    It is found by a mark, since the text of an answer may also stand elsewhere.
    """
    answer = messages[-1]
    marked = replace(answer, reasoning=MARK) if answer.reasoning else Message("assistant", MARK)
    before, found, _ = render_text(tokenizer, [*messages[:-1], marked], False, tools).rpartition(MARK)
    own = answer.reasoning or answer.content
    if not found or not whole.startswith((before + own, before + own.strip())):
        raise UsageError("The model's chat template changes the text of an answer, so it cannot be trained on.")
    return len(before)


def _render_all(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], for_answer: bool, tools: str
) -> list[str]:
    """`render_text` for several conversations with the same tools; the error does not say which was refused."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError(
            f"The tokenizer of {tokenizer.name_or_path} {NO_TEMPLATE}, so it cannot render messages; name one."
        )
    functions = _parse_tools(tools) if tools else None
    as_parts = _takes_parts(tokenizer)
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            [[_to_dict(message, as_parts) for message in chat] for chat in chats],
            tools=functions,
            tokenize=False,
            add_generation_prompt=for_answer,
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in chats[0])
        reason = str(error).rstrip(".")
        raise UsageError(f"The model's chat template refuses a conversation of {roles}: {reason}.") from error
    for chat, text in zip(chats, texts, strict=True):
        _check_written(chat, text, functions)
    return texts


def _to_dict(message: Message, as_parts: bool) -> dict[str, Any]:
    values = message.to_dict()
    if as_parts and isinstance(values["content"], str):
        values["content"] = [{"type": "text", "text": message.content}] if message.content else []
    return values


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template wants contents as lists of parts: some of vision models lose plain text without a word."""
    return not _writes(tokenizer, MARK) and _writes(tokenizer, [{"type": "text", "text": MARK}])


def _writes(tokenizer: PreTrainedTokenizerBase, content: Any) -> bool:
    from jinja2 import TemplateError

    try:
        return MARK in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return False  # what it refuses is told when it is given the real messages


def _parse_tools(tools: str) -> list[dict[str, Any]]:
    try:
        functions = json.loads(tools)
    except ValueError as error:
        raise UsageError(f"The tools are not valid JSON: {error}.") from error
    is_list = isinstance(functions, list) and all(isinstance(function, dict) for function in functions)
    if not is_list or not all(isinstance(function.get("function", {}), dict) for function in functions):
        raise UsageError("The tools are not a JSON array of objects, each the schema of a function.")
    return functions


def _check_written(chat: Sequence[Message], text: str, tools: list[dict[str, Any]] | None) -> None:
    """Refuse what a template drops or spoils in silence."""
    names = (tool.get("function", tool).get("name") for tool in tools or ())
    if lost := next((name for name in names if name and name not in text), None):
        raise UsageError(
            f"The model's chat template does not tell the model of the tool '{lost}'; take a template that writes "
            "tools, such as hermes."
        )
    calls = (call.name for message in chat for call in message.tool_calls)
    if lost := next((name for name in calls if name not in text), None):
        raise UsageError(_NO_CALLS.format(lost))
    # a template for texts alone writes a list of parts as Python shows it
    if any(message.media for message in chat) and re.search(r"\{'type': '(text|image|audio|video)'", text):
        raise UsageError("The model's chat template knows no images, sounds or videos; take a model that does.")


# Tokens. Added tokens (a template's marks) part a text for a fast tokenizer before all else it does, so that what
# stands from one mark to the next can be tokenized by itself; it is done once where it comes often.


def tokenize_all(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """`tokenize` of each text, faster: in one call, and the parts that several texts have in common only once."""
    given = list(texts)
    marks = _find_marks(tokenizer, given[0]) if len(given) > _FEW_TEXTS else None
    if not marks:
        return tokenizer(given, add_special_tokens=False)["input_ids"] if given else []
    # tokenizing the first text whole also takes back a cut or padding that another call has set
    expected = tokenize(tokenizer, given[0])
    cuts = [_cut(text, marks) for text in given]
    parts = list(dict.fromkeys(chain.from_iterable(cuts)))
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(parts, add_special_tokens=False)
    ids = {part: encoding.ids for part, encoding in zip(parts, encodings, strict=True)}
    joined = [list(chain.from_iterable(ids[part] for part in cut)) for cut in cuts]
    if joined[0] != expected:  # a tokenizer with ways of its own, around the fast one
        return tokenizer(given, add_special_tokens=False)["input_ids"]
    return joined


def _find_marks(tokenizer: PreTrainedTokenizerBase, text: str) -> re.Pattern[str] | None:
    """What finds those of the added tokens that stand in `text` (the template's marks) just as the tokenizer does.

    None: there are none, or others could overlap with them.
    """
    if not tokenizer.is_fast:
        return None
    # those with `normalized` are looked for later, in what is left
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized]
    marks = [
        token.content
        for token in added
        if token.content in text and re.match(r"[^\w\s]", token.content) and not (token.lstrip or token.single_word)
    ]
    others = {token.content for token in added}.difference(marks)
    starts = {mark[0] for mark in marks}
    if not marks or any(other.startswith(tuple(marks)) or not starts.isdisjoint(other[1:]) for other in others):
        return None
    # where several begin at the same place, the longest counts
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)))


def _cut(text: str, marks: re.Pattern[str]) -> list[str]:
    """The text in parts, each of which but the first begins with a mark."""
    starts = [match.start() for match in marks.finditer(text)]
    if not starts or starts[0]:
        starts.insert(0, 0)
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]
