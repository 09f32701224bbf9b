"""What a model is evaluated on: the records of a source, encoded as in training, and the questions in them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lory.data.encoding.encode import Encoder
from lory.data.encoding.templates import render_turns
from lory.data.sources.read import SourceConfig, open_source
from lory.generate import decode_text
from lory.runtime import UsageError
from lory.types import Conversation, Sample

_CHUNK = 256
"""Records that are encoded together."""


@dataclass
class Record:
    """One record, and how well its supervised tokens are predicted (sums, filled by `lory.evaluate.prediction`)."""

    conversation: Conversation
    samples: tuple[Sample, ...]
    loss: float = 0.0
    """Sum of -log p over the supervised tokens, in nats."""
    correct: int = 0
    supervised: int = 0
    """How many supervised tokens were measured: none before."""


@dataclass
class Source:
    """The records of one source that can be evaluated."""

    name: str
    records: list[Record]
    read: int
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


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
    encoder.notes = Counter()
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
    notes = [*reader.notes, *(f"{what}: {count}" for what, count in encoder.notes.items())]
    return Source(reader.name, records, reader.read, dropped, notes)


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
    turns = [record.conversation.messages for record in chats]
    tools = [record.conversation.tools for record in chats]
    questions = []
    for record, (prompt, answer) in zip(chats, render_turns(tokenizer, turns, ends, tools), strict=True):
        while answer and answer[-1] in ends:
            answer = answer[:-1]
        messages = [message.to_dict() for message in record.conversation.prompt]
        target = decode_text(tokenizer, answer)
        questions.append(Question(record, tuple(prompt), tuple(answer), messages, target))
    return _keep_short(questions, source, most_tokens)


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


def make_batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of prompts of about the same length; the order of the source is kept roughly.

    So when an evaluation is stopped early, what was answered is a fair part of the source, not its shortest prompts.
    """
    for start in range(0, len(questions), 16 * size):
        near = sorted(questions[start : start + 16 * size], key=lambda question: len(question.prompt_ids))
        yield from (near[first : first + size] for first in range(0, len(near), size))
