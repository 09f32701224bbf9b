"""Conversations to samples of tokens, by the prompt-prefix method.

The prompt of each turn is rendered exactly as it will be when the model is served, and the answer is what the template
adds to it. Turns share one sample as long as the tokens so far are a prefix of the next turn's prompt; where a template
rewrites history (or a token would span the border) the turn becomes a sample of its own. So the tokens that are
trained on are the tokens that are served, by construction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lory.data.templates import render_prompt, render_turn
from lory.runtime import UsageError
from lory.types import IGNORE, Conversation, Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"]
OnLong = Literal["drop", "cut_prompt", "error"]


class Encoder:
    """Encodes conversations with one tokenizer and one set of rules; it counts what was dropped or cut.

    Attributes:
        dropped: conversations that gave no sample, by reason.
        notes: what else was done to conversations, and how often.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        terminators: Sequence[int],
        max_tokens: int,
        on_long: OnLong = "drop",
        loss_on: LossOn = "assistant",
    ) -> None:
        self.tokenizer, self.terminators = tokenizer, tuple(terminators)
        self.max_tokens, self.on_long, self.loss_on = max_tokens, on_long, loss_on
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def encode(self, conversation: Conversation) -> list[Sample]:
        """The samples of one conversation: one as a rule, none when it was dropped, several when it had to be split.

        Raises:
            UsageError: the chat template refuses it, or it is longer than `max_tokens` and `on_long` is `error`.
        """
        lost: list[str] = []
        try:
            if conversation.text is not None:
                samples = self._encode_text(conversation.text)
            else:
                samples = self._encode_messages(conversation.messages, lost)
        except UsageError as error:
            raise UsageError(f"{conversation.where or 'A conversation'}: {error}") from error
        if samples:
            self.notes.update(f"parts of conversations left out, {reason}" for reason in lost)
        else:
            self.dropped[lost[0] if lost else "nothing to learn"] += 1
        return samples

    def _encode_messages(self, messages: Sequence[Message], lost: list[str]) -> list[Sample]:
        """The samples of a chat; `lost` gets the reason for each that was left out."""
        samples: list[Sample] = []
        ids: list[int] = []
        labels: list[int] = []
        for turn, message in enumerate(messages):
            if message.role != "assistant" or (self.loss_on == "last" and turn < len(messages) - 1):
                continue
            prompt, answer = render_turn(self.tokenizer, messages[: turn + 1], self.terminators)
            if self.on_long == "cut_prompt" and len(prompt) + len(answer) > self.max_tokens:
                prompt = self._cut(messages[:turn], self.max_tokens - len(answer))
                if not prompt:
                    lost.append(f"an answer leaves no room for its prompt in {self.max_tokens} tokens")
                    continue
                self.notes["prompts cut"] += 1
            if prompt[: len(ids)] != ids:
                samples += self._finish(ids, labels, lost)
                ids, labels = [], []
            new = prompt[len(ids) :]
            # a prompt that repeats history was learnt with the sample before
            learn_prompt = self.loss_on == "all" and (ids or not samples)
            ids, labels = ids + new + answer, labels + (new if learn_prompt else [IGNORE] * len(new)) + answer
        return samples + self._finish(ids, labels, lost)

    def _finish(self, ids: list[int], labels: list[int], lost: list[str]) -> list[Sample]:
        """The tokens as a sample, unless they are too many or none of them is learnt."""
        sample = Sample(tuple(ids), tuple(labels))
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

    def _cut(self, messages: Sequence[Message], budget: int) -> list[int]:
        """A prompt of at most `budget` tokens: oldest exchanges leave first, then the end of the last question."""
        system = [message for message in messages[:1] if message.role == "system"]
        turns = list(messages[len(system) :])
        while len(turns) > 2:
            turns = turns[2:]
            prompt = render_prompt(self.tokenizer, [*system, *turns])
            if len(prompt) <= budget:
                return prompt
        question = turns[-1].content
        words = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = budget - len(render_prompt(self.tokenizer, [*system, Message("user", "")]))
        while room > 0 and words:
            cut = Message("user", question[: words[min(room, len(words)) - 1][1]])
            prompt = render_prompt(self.tokenizer, [*system, cut])
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
