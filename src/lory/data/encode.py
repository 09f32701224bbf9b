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

from lory.data.templates import render_answer, render_prompt
from lory.runtime import UsageError
from lory.types import IGNORE, Conversation, Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"]
OnLong = Literal["drop", "cut_prompt", "error"]


class Encoder:
    """Encodes conversations with one tokenizer and one set of rules; `counts` says what was dropped or cut, and why."""

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
            UsageError: it is longer than `max_tokens` and `on_long` is `error`.
        """
        if conversation.text is not None:
            return self._encode_text(conversation.text)
        samples: list[Sample] = []
        ids: list[int] = []
        labels: list[int] = []
        last = len(conversation.messages) - 1
        for turn, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            prompt = render_prompt(self.tokenizer, conversation.messages[:turn])
            answer = render_answer(self.tokenizer, conversation.messages[: turn + 1], self.terminators)
            goes_on = prompt[: len(ids)] == ids
            if self.on_long == "cut_prompt" and len(prompt) + len(answer) > self.max_tokens:
                prompt, goes_on = self._cut(conversation.messages[:turn], self.max_tokens - len(answer)), False
                if not prompt:
                    self.dropped[f"an answer leaves no room for its prompt in {self.max_tokens} tokens"] += 1
                    continue
            if not goes_on:
                samples += self._finish(ids, labels, conversation)
                ids, labels = [], []
            new = prompt[len(ids) :]
            ids, labels = ids + new, labels + (new if self.loss_on == "all" else [IGNORE] * len(new))
            learnt = self.loss_on != "last" or turn == last
            ids, labels = ids + answer, labels + (answer if learnt else [IGNORE] * len(answer))
        return samples + self._finish(ids, labels, conversation)

    def _finish(self, ids: list[int], labels: list[int], conversation: Conversation) -> list[Sample]:
        """The tokens as a sample, unless they are too many or none of them is learnt."""
        sample = Sample(tuple(ids), tuple(labels))
        if not sample.supervised:
            return []
        if len(sample) <= self.max_tokens:
            return [sample]
        if self.on_long == "error":
            raise UsageError(
                f"{conversation.where}: {len(sample)} tokens, more than data.max_tokens ({self.max_tokens}); raise it, "
                "or set data.on_long to drop or cut_prompt."
            )
        self.dropped[f"longer than {self.max_tokens} tokens"] += 1
        return []

    def _cut(self, messages: Sequence[Message], budget: int) -> list[int]:
        """A prompt of at most `budget` tokens: oldest exchanges leave first, then the end of the last question."""
        self.notes["prompts cut"] += 1
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
        while room > 0:
            cut = Message("user", question[: words[min(room, len(words)) - 1][1]])
            prompt = render_prompt(self.tokenizer, [*system, cut])
            if len(prompt) <= budget:
                return prompt
            room -= len(prompt) - budget
        return []

    def _encode_text(self, text: str) -> list[Sample]:
        """Plain text with its end, all of it learnt, in windows of `max_tokens`."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if not ids or ids[-1] not in self.terminators:
            ids = [*ids, self.terminators[0]]
        windows = [tuple(ids[start : start + self.max_tokens]) for start in range(0, len(ids), self.max_tokens)]
        if len(windows) > 1:
            if self.on_long == "error":
                raise UsageError(f"A text has {len(ids)} tokens, more than data.max_tokens ({self.max_tokens}).")
            self.notes["texts split into windows"] += 1
        # a window of one token has nothing to predict
        return [Sample(window, window) for window in windows if len(window) > 1]
