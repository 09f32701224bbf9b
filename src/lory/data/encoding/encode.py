"""Conversations to samples of tokens, by the prompt-prefix method.

The prompt of each turn is rendered exactly as it will be when the model is served, and the answer is what the template
adds to it. Turns share one sample as long as the tokens so far are a prefix of the next turn's prompt; where a template
rewrites history (or a token would span the border) the turn becomes a sample of its own. So the tokens that are
trained on are the tokens that are served, by construction.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lory.data.encoding.store import Encoded
from lory.data.encoding.templates import RefusedTurn, render_prompt, render_turns
from lory.runtime import UsageError
from lory.types import IGNORE, Conversation, Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"]
OnLong = Literal["drop", "cut_prompt", "error"]


class Encoder:
    """Encodes conversations with one tokenizer and one set of rules.

    Attributes:
        notes: what was done to conversations that gave a sample all the same, and how often.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        terminators: Sequence[int],
        max_tokens: int,
        on_long: OnLong = "drop",
        loss_on: LossOn = "assistant",
    ) -> None:
        if on_long == "cut_prompt" and not tokenizer.is_fast:
            raise UsageError(
                f"data.on_long is cut_prompt, but the tokenizer of {tokenizer.name_or_path} is a slow one, which "
                "does not say where in a text its tokens are; set it to drop or error."
            )
        self.tokenizer, self.terminators = tokenizer, tuple(terminators)
        self.max_tokens, self.on_long, self.loss_on = max_tokens, on_long, loss_on
        self.notes: Counter[str] = Counter()

    def encode(self, conversation: Conversation) -> Encoded:
        """The samples of one conversation: one as a rule, none when it was dropped, several when it had to be split.

        Raises:
            UsageError: it is of a kind that cannot be learnt here, the chat template refuses it, or it is longer than
                `max_tokens` and `on_long` is `error`.
        """
        return self.encode_all([conversation])[0]

    def encode_all(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """`encode` for many, which is faster than one by one."""
        for conversation in conversations:
            with _naming(conversation):
                _check_kind(conversation, self.loss_on)
        turns = [(number, turn) for number, given in enumerate(conversations) for turn in self._find_turns(given)]
        chats = [conversations[number].messages[: turn + 1] for number, turn in turns]
        tools = [conversations[number].tools for number, _ in turns]
        try:
            rendered = dict(zip(turns, render_turns(self.tokenizer, chats, self.terminators, tools), strict=True))
        except RefusedTurn as error:
            with _naming(conversations[turns[error.index][0]]):
                raise
        encoded = []
        for number, conversation in enumerate(conversations):
            parts = {turn: rendered[number, turn] for turn in self._find_turns(conversation)}
            with _naming(conversation):
                encoded.append(self._encode_one(conversation, parts))
        return encoded

    def _find_turns(self, conversation: Conversation) -> list[int]:
        """The answers that are rendered: one that is not learnt is written by the next prompt, too.

        (But where prompts are learnt themselves, it has to be told from them.)
        """
        messages = conversation.messages
        return [
            turn
            for turn, message in enumerate(messages)
            if message.role == "assistant"
            and (self._weigh(message, turn == len(messages) - 1) or self.loss_on == "all")
        ]

    def _encode_one(self, conversation: Conversation, rendered: Mapping[int, tuple[list[int], list[int]]]) -> Encoded:
        if conversation.label == "false":
            return Encoded((), "its answer is labelled as not wanted")
        lost: list[str] = []
        if conversation.text is not None:
            samples = self._encode_text(conversation.text)
        else:
            samples = self._encode_messages(conversation, rendered, lost)
        if not samples:
            return Encoded((), lost[0] if lost else "nothing to learn")
        self.notes.update(f"parts of conversations left out, {reason}" for reason in lost)
        if conversation.rejected:
            self.notes["preference pairs, of which the chosen answer is learnt"] += 1
        return Encoded(tuple(samples))

    def _encode_messages(
        self, conversation: Conversation, rendered: Mapping[int, tuple[list[int], list[int]]], lost: list[str]
    ) -> list[Sample]:
        """The samples of a chat; `lost` gets the reason for each that was left out.

        Args:
            rendered: prompt and answer of each turn that is needed.
        """
        messages, tools = conversation.messages, conversation.tools
        draft = _Draft()
        samples: list[Sample] = []
        for turn, (prompt, answer) in rendered.items():
            if self.on_long == "cut_prompt" and len(prompt) + len(answer) > self.max_tokens:
                prompt = self._cut(messages[:turn], self.max_tokens - len(answer), tools)
                if not prompt:
                    lost.append(f"an answer leaves no room for its prompt in {self.max_tokens} tokens")
                    continue
                self.notes["prompts cut"] += 1
            if prompt[: len(draft.ids)] != draft.ids:
                samples += self._finish(draft, lost)
                draft = _Draft()
            # a prompt that repeats history was learnt with the sample before
            learn_prompt = self.loss_on == "all" and (draft.ids or not samples)
            draft.add(prompt[len(draft.ids) :], 1.0 if learn_prompt else 0.0)
            draft.add(answer, self._weigh(messages[turn], turn == len(messages) - 1))
        return samples + self._finish(draft, lost)

    def _weigh(self, message: Message, last: bool) -> float:
        """How much an answer counts: as the message itself says, else as `loss_on` does."""
        if message.weight is not None:
            return message.weight
        return float(self.loss_on != "last" or last)

    def _finish(self, draft: _Draft, lost: list[str]) -> list[Sample]:
        """The tokens as a sample, unless they are too many or none of them is learnt."""
        sample = draft.to_sample()
        if not sample.supervised:
            return []
        if len(sample) <= self.max_tokens:
            return [sample]
        if self.on_long == "error":
            raise UsageError(
                f"{len(sample)} tokens, more than data.max_tokens ({self.max_tokens}); raise it, or set data.on_long "
                "to drop or cut_prompt."
            )
        lost.append(f"longer than {self.max_tokens} tokens")
        return []

    def _cut(self, messages: Sequence[Message], budget: int, tools: str) -> list[int]:
        """A prompt of at most `budget` tokens: oldest exchanges leave first, then the end of the last question."""
        system = [message for message in messages[:1] if message.role == "system"]
        questions = [number for number, message in enumerate(messages) if message.role == "user"]
        for start in questions[1:]:
            prompt = render_prompt(self.tokenizer, [*system, *messages[start:]], tools)
            if len(prompt) <= budget:
                return prompt
        if not questions or questions[-1] != len(messages) - 1:
            return []  # tools were called after the last question; none of that can be left out
        question = messages[-1].content
        words = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = budget - len(render_prompt(self.tokenizer, [*system, Message("user", "")], tools))
        while room > 0 and words:
            cut = Message("user", question[: words[min(room, len(words)) - 1][1]])
            prompt = render_prompt(self.tokenizer, [*system, cut], tools)
            if len(prompt) <= budget:
                return prompt
            room -= len(prompt) - budget
        return []

    def _encode_text(self, text: str) -> list[Sample]:
        """Plain text with its end, in windows of `max_tokens`; each token but the first is learnt, once."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if not ids or ids[-1] not in self.terminators:
            ids = [*ids, self.terminators[0]]
        # a window begins with the last token of the one before: nothing could predict its first token otherwise
        starts = range(0, len(ids) - 1, self.max_tokens - 1)
        windows = [tuple(ids[start : start + self.max_tokens]) for start in starts]
        if len(windows) > 1:
            if self.on_long == "error":
                raise UsageError(f"{len(ids)} tokens, more than data.max_tokens ({self.max_tokens}).")
            self.notes["texts split into windows"] += 1
        return [Sample(window, window) for window in windows]


class _Draft:
    """A sample that grows turn by turn."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []

    def add(self, ids: list[int], weight: float) -> None:
        """Append tokens that count `weight` in the loss; with 0 they are context."""
        self.ids = self.ids + ids
        self.labels += ids if weight else [IGNORE] * len(ids)
        self.weights += [weight] * len(ids)

    def to_sample(self) -> Sample:
        """The tokens so far; weights are kept only where they differ from 1."""
        weighted = any(weight not in (0.0, 1.0) for weight in set(self.weights))
        return Sample(tuple(self.ids), tuple(self.labels), tuple(self.weights) if weighted else None)


@contextlib.contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Put the conversation's place before what is wrong with it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{conversation.where or 'A conversation'}: {error}") from error


def _check_kind(conversation: Conversation, loss_on: LossOn) -> None:
    """Refuse what a language model cannot learn from, or not as it is asked to."""
    if conversation.text is not None and conversation.label is not None:
        raise UsageError(
            f"the record is a text with the label '{conversation.label[:40]}', and this model writes text; to teach it "
            "to write the label, map the columns: {prompt: text's column, completion: label's column}."
        )
    for message in conversation.messages:
        if message.media:
            raise UsageError(f"a message has {message.media[0].kind}s, but this model reads text only.")
        usual = float(loss_on == "all")
        if message.role != "assistant" and message.weight not in (None, usual):
            raise UsageError(
                f"a message from '{message.role}' has the weight {message.weight:g}, but with data.loss_on: {loss_on} "
                f"it counts {usual:g}; only answers can be weighted."
            )
