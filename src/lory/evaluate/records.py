"""What a model is evaluated on: the records of a source, encoded as in training, and the questions in them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lory.data.encoding.cache import find_rules, list_notes
from lory.data.encoding.encode import Encoder
from lory.data.encoding.pictures import ImageRules
from lory.data.encoding.templates import render_turns
from lory.data.sources.read import SourceConfig, open_source
from lory.data.vision.reader import make_prompt
from lory.generate import Ids, decode_text
from lory.runtime import UsageError
from lory.types import Conversation, Media, Message, Sample

if TYPE_CHECKING:
    from lory.assistant import Assistant

_CHUNK = 256
"""Records that are encoded together."""


@dataclass
class Record:
    """One record, and how well its supervised tokens are predicted (sums, filled by `lory.evaluate.prediction`)."""

    conversation: Conversation
    samples: tuple[Sample, ...]
    loss: float = 0.0
    """Sum of -log p over the supervised tokens, in nats, each times its weight."""
    correct: float = 0.0
    """The weights of those that were predicted."""
    weight: float = 0.0
    supervised: int = 0
    """How many supervised tokens were measured: none before."""

    @property
    def images(self) -> tuple[Media, ...]:
        """Those of the prompt, in their order; what was fetched from the web is not fetched again."""
        media = [media for message in self.conversation.prompt for media in message.media]
        copies = self.samples[-1].images if self.samples else ()
        if len(copies) != len(media):
            return tuple(media)
        return tuple(
            Media(one.kind, copy.source) if isinstance(copy.source, bytes) else one
            for one, copy in zip(media, copies, strict=True)
        )

    def scores(self) -> dict[str, float]:
        """Mean loss and token accuracy; nothing before it was measured."""
        return {"loss": self.loss / self.weight, "token_accuracy": self.correct / self.weight} if self.weight else {}


@dataclass
class Source:
    """The records of one source that can be evaluated."""

    name: str
    records: list[Record]
    read: int
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    rules: ImageRules = field(default_factory=ImageRules)
    """Which images of its records are opened."""


@dataclass(frozen=True)
class Question:
    """A prompt with the text that is to come after it."""

    record: Record
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    """Without a terminator."""
    prompt: list[dict[str, Any]] | str
    """Messages, or the plain text before the continuation."""
    target: str
    rules: ImageRules | None = None
    """Of a model that sees: which images are opened."""

    def make_prompt(self, assistant: Assistant) -> Ids:
        """What the model is fed; the images are opened now.

        Raises:
            UsageError: one cannot be opened any more.
        """
        if self.rules is None:
            return self.prompt_ids
        conversation, images = self.record.conversation, iter(self.record.images)
        messages = [
            replace(message, media=tuple(next(images) for _ in message.media)) for message in conversation.prompt
        ]
        root, limits = next(iter(self.rules.roots), None), self.rules.limits
        return make_prompt(assistant.tokenizer, assistant.reader, messages, conversation.tools, root, limits)

    @property
    def prompt_text(self) -> str:
        """The prompt as one text, the same for equal prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message["content"]) for message in self.prompt)


def read_sources(configs: Sequence[SourceConfig], encoder: Encoder, most: int | None) -> list[Source]:
    """The sources' records, encoded; equal names are numbered.

    Args:
        most: draw so many records of a source that draws no sample of its own, and read so many windows of each source
            whose texts are longer than a window; None: all.

    Raises:
        UsageError: bad data, or a source has nothing to evaluate on.
    """
    sources: list[Source] = []
    for config in configs:
        if most is not None and config.sample is None:
            config = config.model_copy(update={"sample": most})
        source = _read(config, encoder)
        if most is not None:
            _keep_windows(source, most)
        names = {other.name for other in sources}
        candidates = itertools.chain([source.name], (f"{source.name}-{number}" for number in itertools.count(2)))
        sources.append(replace(source, name=next(name for name in candidates if name not in names)))
    return sources


def _read(config: SourceConfig, encoder: Encoder) -> Source:
    reader = open_source(config)
    encoder = encoder.with_rules(find_rules([reader], encoder.rules))
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    conversations = iter(reader)
    while chunk := list(itertools.islice(conversations, _CHUNK)):
        for conversation, encoded in zip(chunk, encoder.encode_all(chunk), strict=True):
            if encoded.samples:
                records.append(Record(conversation, encoded.samples))
            else:
                dropped[encoded.dropped] += 1
    dropped.update(reader.dropped)
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UsageError(f"{reader.name} has no record to evaluate on: {reasons}; look at its format or --max-tokens.")
    notes = [*reader.notes, *list_notes(encoder.notes)]
    return Source(reader.name, records, reader.read, dropped, notes, encoder.rules)


def _keep_windows(source: Source, most: int) -> None:
    """Leave `most` windows of the source's texts: the first of each, then the second of each, ..."""
    texts = [record for record in source.records if record.conversation.text is not None]
    in_turn = sorted((number, index) for index, record in enumerate(texts) for number in range(len(record.samples)))
    if len(in_turn) > most:
        kept = Counter(index for _, index in in_turn[:most])
        for index, record in enumerate(texts):
            record.samples = record.samples[: kept[index]]
        source.notes.append(f"windows of plain texts that are read: {most:,} of {len(in_turn):,}")


def list_questions(source: Source, encoder: Encoder, most_tokens: int) -> list[Question]:
    """The last prompt of each chat, and the answer to it as the chat template writes it.

    Args:
        most_tokens: a longer prompt leaves the model no room to answer; such are left out, and noted.
    """
    tokenizer, ends = encoder.tokenizer, encoder.terminators
    chats = [record for record in source.records if record.conversation.messages]
    if len(chats) < len(source.records):
        count = len(source.records) - len(chats)
        source.notes.append(f"{count} plain texts have no prompt to answer; --greedy-continuation goes on with them")
    if encoder.reader is not None:
        return _keep_short([_show(record, encoder, source.rules) for record in chats], source, most_tokens)
    turns = [record.conversation.messages for record in chats]
    tools = [record.conversation.tools for record in chats]
    questions = []
    for record, (prompt, answer) in zip(chats, render_turns(tokenizer, turns, ends, tools), strict=True):
        while answer and answer[-1] in ends:
            answer = answer[:-1]
        target = decode_text(tokenizer, answer)
        messages = describe_messages(record.conversation.prompt)
        questions.append(Question(record, tuple(prompt), tuple(answer), messages, target))
    return _keep_short(questions, source, most_tokens)


def _show(record: Record, encoder: Encoder, rules: ImageRules) -> Question:
    """The question that a model which sees is asked; images are opened again then."""
    conversation = record.conversation
    target = conversation.messages[-1].content
    ids = encoder.tokenizer(target, add_special_tokens=False)["input_ids"]
    # in place of the prompt, whose length this tells about
    start = record.samples[-1].input_ids[: -len(ids) or None]
    return Question(record, start, tuple(ids), describe_messages(conversation.prompt), target, rules)


def describe_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as files and pages show them: an image by its path or address, or by how many bytes it has."""
    described = []
    for message in messages:
        if not message.media:
            described.append(message.to_dict())
            continue
        values = {**replace(message, media=()).to_dict(), "images": [_name(media.source) for media in message.media]}
        described.append(values)
    return described


def _name(source: str | bytes) -> str:
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    return f"{source[:30]}…" if source[:5].lower() == "data:" else source


def _keep_short(questions: list[Question], source: Source, most_tokens: int) -> list[Question]:
    short = [question for question in questions if len(question.prompt_ids) <= most_tokens]
    if left_out := len(questions) - len(short):
        source.notes.append(f"prompts left out since they fill the model's context: {left_out}")
    return short


def list_prefixes(source: Source, encoder: Encoder, lengths: tuple[int, int], most: int | None) -> list[Question]:
    """Prefixes of plain texts with the tokens that come next, as Welleck et al. (arXiv 1908.04319) continue them.

    Each text is cut into windows of prefix and continuation, none of which overlap.

    Args:
        lengths: of a prefix and of its continuation, in tokens.
        most: so many prefixes, taken from all texts in turn; None: all.
    """
    tokenizer, (before, after) = encoder.tokenizer, lengths
    texts = [record for record in source.records if record.conversation.text is not None]
    windows = [_cut(tokenizer(record.conversation.text)["input_ids"], before + after) for record in texts]
    short = sum(not own for own in windows)
    if short:
        source.notes.append(f"texts shorter than {before + after} tokens, which are not continued: {short}")
    # the first window of each text, then the second of each, ..., so that `most` takes of all
    in_turn = sorted((number, index) for index, own in enumerate(windows) for number in range(len(own)))
    questions = []
    for number, index in in_turn[:most]:
        ids = windows[index][number]
        prefix, rest = ids[:before], ids[before:]
        prompt, target = (tokenizer.decode(list(part)) for part in (prefix, rest))
        questions.append(Question(texts[index], prefix, rest, prompt, target))
    return questions


def _cut(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
