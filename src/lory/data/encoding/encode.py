"""Conversations to samples of tokens, by the prompt-prefix method.

The prompt of each turn is rendered exactly as it will be when the model is served, and the answer is what the template
adds to it. Turns share one sample as long as the tokens so far are a prefix of the next turn's prompt; where a template
rewrites history (or a token would span the border) the turn becomes a sample of its own. So the tokens that are
trained on are the tokens that are served, by construction.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lory.data.encoding.pictures import BadImage, ImageRules, Pictures, find_images
from lory.data.encoding.store import Encoded
from lory.data.encoding.templates import RefusedTurn, render_text, render_turns, tokenize
from lory.data.vision.reader import ImageReader
from lory.runtime import UsageError, log
from lory.types import IGNORE, Conversation, Message, Sample, SampleImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"]
OnLong = Literal["drop", "cut_prompt", "shrink_images", "error"]

_MOST_SHRINKS = 8
"""How often the images of a sample are made smaller before it counts as too long."""


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
        reader: ImageReader | None = None,
        rules: ImageRules | None = None,
    ) -> None:
        """`reader`: of a model that sees; `rules`: which images are opened."""
        if on_long == "cut_prompt" and not tokenizer.is_fast:
            raise UsageError(
                f"data.on_long is cut_prompt, but the tokenizer of {tokenizer.name_or_path} is a slow one, which "
                "does not say where in a text its tokens are; set it to drop or error."
            )
        self.tokenizer, self.terminators = tokenizer, tuple(terminators)
        self.max_tokens, self.on_long, self.loss_on = max_tokens, on_long, loss_on
        self.reader, self.rules = reader, rules or ImageRules()
        self.notes: Counter[str] = Counter()

    def with_rules(self, rules: ImageRules) -> Encoder:
        """The same encoder for the images of another source, with notes of its own."""
        other = copy.copy(self)
        other.rules, other.notes = rules, Counter()
        return other

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
                if self.reader is None:
                    _check_no_media(conversation)
        reader = self.reader
        if reader is not None and any(_speaks_of_images(conversation, reader.mark) for conversation in conversations):
            # one by one, since the images of many take much memory
            return [self._encode_alone(conversation, reader) for conversation in conversations]
        try:
            return self._encode_batch(conversations)
        except RefusedTurn as error:
            if not self._drops(error):
                with _naming(conversations[error.index]):
                    raise
        return [self._encode_alone(conversation) for conversation in conversations]

    def _drops(self, error: BadImage | RefusedTurn) -> bool:
        """Whether a conversation is left out for it; for want of a template that would be every one."""
        return self.rules.on_bad == "drop" and (isinstance(error, BadImage) or bool(self.tokenizer.chat_template))

    def _encode_alone(self, conversation: Conversation, reader: ImageReader | None = None) -> Encoded:
        """The samples of one conversation, or why it was left out; its images are opened here if there is a reader."""
        try:
            pictures = None
            if reader is not None:
                media = find_images(conversation.messages)
                pictures = Pictures(reader, media, self.rules)
                if self.on_long == "shrink_images" and media:
                    self._shrink(conversation, pictures)
            return self._encode_batch([conversation], pictures)[0]
        except (BadImage, RefusedTurn) as error:
            if not self._drops(error):
                with _naming(conversation):
                    raise
            log.warning("%s: left out: %s", conversation.where or "A conversation", error)
            self.notes[f"left out {conversation.where}: {error}"] += 1
            return Encoded((), f"malformed: {error.reason}", error.path if isinstance(error, BadImage) else "")

    def _shrink(self, conversation: Conversation, pictures: Pictures) -> None:
        """Make the images smaller until the longest turn fits, as far as that goes."""
        assert self.reader is not None
        for number in range(_MOST_SHRINKS):
            turns = self._find_turns(conversation)
            rendered = self._render([conversation], [(0, turn) for turn in turns], pictures).values()
            longest = max(([*prompt, *answer] for prompt, answer in rendered), key=len, default=[])
            excess, seen = len(longest) - self.max_tokens, longest.count(self.reader.token_id)
            if excess <= 0 or seen <= excess or not pictures.shrink((seen - excess) / seen):
                return
            self.notes["conversations whose images were shrunk"] += number == 0

    def _encode_batch(self, conversations: Sequence[Conversation], pictures: Pictures | None = None) -> list[Encoded]:
        """The samples of conversations; those of one with images alone, since `pictures` are its own."""
        turns = [(number, turn) for number, given in enumerate(conversations) for turn in self._find_turns(given)]
        rendered = self._render(conversations, turns, pictures)
        encoded = []
        for number, conversation in enumerate(conversations):
            parts = {turn: rendered[number, turn] for turn in self._find_turns(conversation)}
            with _naming(conversation):
                images = pictures.references if pictures else []
                encoded.append(self._encode_one(conversation, parts, images))
        return encoded

    def _render(
        self, conversations: Sequence[Conversation], turns: list[tuple[int, int]], pictures: Pictures | None
    ) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
        """Prompt and answer of each turn, by the numbers of its conversation and message.

        Raises:
            RefusedTurn: with the number of the conversation in place of the turn's.
        """
        chats = [conversations[number].messages[: turn + 1] for number, turn in turns]
        tools = [conversations[number].tools for number, _ in turns]
        reader = self.reader

        def place_images(number: int, prompt: str, whole: str) -> tuple[str, str]:
            assert reader is not None
            before, upto = (count_media(messages) for messages in (chats[number][:-1], chats[number]))
            first, all_ = (pictures.marks(count) if pictures else [] for count in (before, upto))
            try:
                return reader.expand(prompt, first), reader.expand(whole, all_)
            except UsageError as error:
                raise BadImage(str(error)) from error

        finish = None if reader is None else place_images
        try:
            rendered = render_turns(self.tokenizer, chats, self.terminators, tools, finish)
        except RefusedTurn as error:
            raise RefusedTurn(str(error), turns[error.index][0]) from error
        return dict(zip(turns, rendered, strict=True))

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

    def _encode_one(
        self,
        conversation: Conversation,
        rendered: Mapping[int, tuple[list[int], list[int]]],
        images: Sequence[SampleImage] = (),
    ) -> Encoded:
        if conversation.label == "false":
            return Encoded((), "its answer is labelled as not wanted")
        lost: list[str] = []
        if conversation.text is not None:
            samples = self._encode_text(conversation.text)
        else:
            samples = self._encode_messages(conversation, rendered, lost, images)
        if not samples:
            return Encoded((), lost[0] if lost else "nothing to learn")
        self.notes.update(f"parts of conversations left out, {reason}" for reason in lost)
        if conversation.rejected:
            self.notes["preference pairs, of which the chosen answer is learnt"] += 1
        return Encoded(tuple(samples))

    def _encode_messages(
        self,
        conversation: Conversation,
        rendered: Mapping[int, tuple[list[int], list[int]]],
        lost: list[str],
        images: Sequence[SampleImage] = (),
    ) -> list[Sample]:
        """The samples of a chat; `lost` gets the reason for each that was left out.

        Args:
            rendered: prompt and answer of each turn that is needed.
        """
        messages, tools = conversation.messages, conversation.tools
        draft = self._start(images)
        samples: list[Sample] = []
        for turn, (prompt, answer) in rendered.items():
            too_long = len(prompt) + len(answer) > self.max_tokens
            if self.on_long == "cut_prompt" and too_long and not count_media(messages[:turn]):
                prompt = self._cut(messages[:turn], self.max_tokens - len(answer), tools)
                if not prompt:
                    lost.append(f"an answer leaves no room for its prompt in {self.max_tokens} tokens")
                    continue
                self.notes["prompts cut"] += 1
            if prompt[: len(draft.ids)] != draft.ids:
                samples += self._finish(draft, lost)
                draft = self._start(images)
            # a prompt that repeats history was learnt with the sample before
            learn_prompt = self.loss_on == "all" and (draft.ids or not samples)
            draft.add(prompt[len(draft.ids) :], 1.0 if learn_prompt else 0.0)
            draft.add(answer, self._weigh(messages[turn], turn == len(messages) - 1))
            draft.seen = count_media(messages[: turn + 1])
        return samples + self._finish(draft, lost)

    def _start(self, images: Sequence[SampleImage]) -> _Draft:
        return _Draft(images, self.reader.token_id if self.reader is not None else None)

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
        with_images = ", images included, which are not cut" if sample.images else ""
        lost.append(f"longer than {self.max_tokens} tokens{with_images}")
        return []

    def _cut(self, messages: Sequence[Message], budget: int, tools: str) -> list[int]:
        """A prompt of at most `budget` tokens: oldest exchanges leave first, then the end of the last question."""
        system = [message for message in messages[:1] if message.role == "system"]
        questions = [number for number, message in enumerate(messages) if message.role == "user"]
        for start in questions[1:]:
            prompt = self._prompt([*system, *messages[start:]], tools)
            if len(prompt) <= budget:
                return prompt
        if not questions or questions[-1] != len(messages) - 1:
            return []  # tools were called after the last question; none of that can be left out
        question = messages[-1].content
        words = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = budget - len(self._prompt([*system, Message("user", "")], tools))
        while room > 0 and words:
            cut = Message("user", question[: words[min(room, len(words)) - 1][1]])
            prompt = self._prompt([*system, cut], tools)
            if len(prompt) <= budget:
                return prompt
            room -= len(prompt) - budget
        return []

    def _prompt(self, messages: Sequence[Message], tools: str) -> list[int]:
        text = render_text(self.tokenizer, messages, for_answer=True, tools=tools)
        return tokenize(self.tokenizer, text if self.reader is None else self.reader.expand(text, []))

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
    """A sample that grows turn by turn.

    Attributes:
        seen: how many of the conversation's images stand in it.
    """

    def __init__(self, images: Sequence[SampleImage] = (), image_token: int | None = None) -> None:
        """`images`: all of the conversation's; `image_token`: what stands for a part of one, and is never learnt."""
        self.images, self.image_token, self.seen = images, image_token, 0
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []

    def add(self, ids: list[int], weight: float) -> None:
        """Append tokens that count `weight` in the loss; with 0 they are context."""
        self.ids = self.ids + ids
        if not weight:
            self.labels += [IGNORE] * len(ids)
        elif self.image_token is None:
            self.labels += ids
        else:
            self.labels += [IGNORE if token == self.image_token else token for token in ids]
        self.weights += [weight] * len(ids)

    def to_sample(self) -> Sample:
        """The tokens so far; weights are kept only where they differ from 1."""
        weighted = any(weight not in (0.0, 1.0) for weight in set(self.weights))
        weights = tuple(self.weights) if weighted else None
        return Sample(tuple(self.ids), tuple(self.labels), weights, tuple(self.images[: self.seen]))


def count_media(messages: Sequence[Message]) -> int:
    """How many images, sounds and videos messages have."""
    return sum(len(message.media) for message in messages)


@contextlib.contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Put the conversation's place before what is wrong with it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{conversation.where or 'A conversation'}: {error}") from error


def _check_no_media(conversation: Conversation) -> None:
    for message in conversation.messages:
        if message.media:
            raise UsageError(f"a message has {message.media[0].kind}s, but this model reads text only.")


def _speaks_of_images(conversation: Conversation, mark: str) -> bool:
    """Whether a conversation has images, or a mark for one; `mark`: the model's own."""
    return any(
        message.media or "<image>" in message.content or mark in message.content for message in conversation.messages
    )


def _check_kind(conversation: Conversation, loss_on: LossOn) -> None:
    """Refuse what a language model cannot learn from, or not as it is asked to."""
    if conversation.text is not None and conversation.label is not None:
        raise UsageError(
            f"the record is a text with the label '{conversation.label[:40]}', and this model writes text; to teach it "
            "to write the label, map the columns: {prompt: text's column, completion: label's column}."
        )
    for message in conversation.messages:
        usual = float(loss_on == "all")
        if message.role != "assistant" and message.weight not in (None, usual):
            raise UsageError(
                f"a message from '{message.role}' has the weight {message.weight:g}, but with data.loss_on: {loss_on} "
                f"it counts {usual:g}; only answers can be weighted."
            )
