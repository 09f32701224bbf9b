"""The data section of a config, carried out: sources to conversations to training and evaluation samples."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lory.config import Section
from lory.data.encode import Encoder, LossOn, OnLong
from lory.data.sources import SourceConfig, SourceData, read_source
from lory.runtime import UsageError
from lory.types import Conversation, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataConfig(Section):
    """What is learnt from, and how it becomes tokens."""

    train: list[SourceConfig] = Field(min_length=1, description="Sources to train on.")
    eval: list[SourceConfig] = Field(default=[], description="Sources to evaluate on, in place of eval_fraction.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the training conversations kept for evaluation."
    )
    max_tokens: int = Field(1024, ge=8, description="Longest sample, and the length of a packed row, in tokens.")
    on_long: OnLong = Field(
        "drop",
        description="What happens to a longer sample: drop, cut_prompt (its answer stays whole) or error.",
    )
    loss_on: LossOn = Field("assistant", description="What is learnt: assistant (each answer), last (answer) or all.")
    packing: bool = Field(True, description="Put several samples into one row of max_tokens, kept apart.")

    @model_validator(mode="after")
    def _check_eval(self) -> DataConfig:
        if self.eval and self.eval_fraction:
            raise ValueError("both eval and eval_fraction are given; use one of them")
        return self


@dataclass
class EncodedSource:
    """One source's samples, with what was kept and dropped."""

    name: str
    config: SourceConfig
    source: SourceData
    train: list[Sample] = field(default_factory=list)
    eval: list[Sample] = field(default_factory=list)
    kept: int = 0
    """Conversations that gave a sample."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records that gave none, by reason; with `kept` they add up to the records that were read (or drawn)."""
    notes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """The source's part of data.json; lengths are in tokens."""
        lengths = sorted(len(sample) for sample in [*self.train, *self.eval])
        return {
            "name": self.name,
            "path": self.config.path,
            "read": self.source.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "notes": [*self.source.notes, *self.notes],
            "samples": {"train": len(self.train), "eval": len(self.eval)},
            "tokens": sum(lengths),
            "supervised_tokens": sum(sample.supervised for sample in [*self.train, *self.eval]),
            "lengths": {
                "min": lengths[0],
                "median": statistics.median(lengths),
                "mean": round(statistics.fmean(lengths), 1),
                "p95": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
                "max": lengths[-1],
            }
            if lengths
            else None,
            "fingerprint": self.source.fingerprint,
        }


@dataclass
class Dataset:
    """Everything a run learns from and is evaluated on."""

    sources: list[EncodedSource]

    @property
    def train(self) -> list[Sample]:
        """The training samples of all sources, one source after the other."""
        return [sample for source in self.sources for sample in source.train]

    @property
    def eval(self) -> dict[str, list[Sample]]:
        """The evaluation samples by source; sources without any are left out."""
        return {source.name: source.eval for source in self.sources if source.eval}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all samples: equal for two runs that learn the same tokens in the same order."""
        digest = hashlib.sha256()
        for source in self.sources:
            for part in (source.train, source.eval):
                for sample in part:
                    digest.update(repr((sample.input_ids, sample.labels)).encode())
                digest.update(b"|")
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        """data.json: per source what was read, kept and dropped, and why."""
        return {"fingerprint": self.fingerprint, "sources": [source.report() for source in self.sources]}


def build_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, terminators: Sequence[int], seed: int
) -> Dataset:
    """Read, split and encode all sources.

    Args:
        terminators: token ids that end an answer, the first of which is written where a template has none.
        seed: picks the conversations that are kept for evaluation.

    Raises:
        UsageError: bad data, or nothing left to learn.
    """
    sources = [EncodedSource(name, source, read_source(source)) for name, source in _name_sources(config.train)]
    held_out = [EncodedSource(name, source, read_source(source)) for name, source in _name_sources(config.eval)]
    parts = _split(sources, held_out, config.eval_fraction, seed)
    for source, train, evaluation in parts:
        encoder = Encoder(tokenizer, terminators, config.max_tokens, config.on_long, config.loss_on)
        source.train = _encode_all(train, encoder, source)
        source.eval = _encode_all(evaluation, encoder, source)
        source.dropped.update(source.source.dropped)
        source.dropped.update(encoder.dropped)
        source.notes += [f"{what}: {count}" for what, count in encoder.notes.items()]
    dataset = Dataset([source for source, _, _ in parts])
    if not any(sample.supervised for sample in dataset.train):
        reasons = Counter[str]()
        for source in dataset.sources:
            reasons.update(source.dropped)
        why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
        why = why or "all of its conversations are kept for evaluation"
        raise UsageError(f"No token is left to learn from data.train ({why}).")
    return dataset


def _encode_all(conversations: Sequence[Conversation], encoder: Encoder, source: EncodedSource) -> list[Sample]:
    samples = []
    for conversation in conversations:
        new = encoder.encode(conversation)
        source.kept += bool(new)
        samples += new
    return samples


def _name_sources(configs: Sequence[SourceConfig]) -> list[tuple[str, SourceConfig]]:
    """A name for each source, the end of its path; equal ones are numbered."""
    taken: set[str] = set()
    named = []
    for config in configs:
        name = config.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
        free = next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)
        taken.add(free)
        named.append((free, config))
    return named


def _question(conversation: Conversation) -> str:
    """What identifies a conversation for the split: its first question.

    Conversations that begin alike stay on one side, since each of their answers is learnt.
    """
    if conversation.text is not None:
        return conversation.text
    return next(message.content for message in conversation.messages if message.role == "user")


def _split(
    sources: list[EncodedSource], held_out: list[EncodedSource], fraction: float, seed: int
) -> list[tuple[EncodedSource, list[Conversation], list[Conversation]]]:
    """Training and evaluation conversations of each source, without a question in common."""
    if held_out:
        asked = {_question(c) for source in held_out for c in source.source.conversations}
        parts = []
        for source in sources:
            train = [c for c in source.source.conversations if _question(c) not in asked]
            if overlap := len(source.source.conversations) - len(train):
                source.dropped["its question is in data.eval, too"] += overlap
            parts.append((source, train, list[Conversation]()))
        for source in held_out:
            # a source that stands in both lists keeps its name apart
            source.name = f"{source.name} (eval)" if any(s.name == source.name for s in sources) else source.name
            parts.append((source, [], source.source.conversations))
        return parts
    chosen = [_choose_questions(source.source.conversations, fraction, seed) for source in sources]
    for source, questions in zip(sources, chosen, strict=True):
        if fraction and not questions:
            count = len(source.source.conversations)
            source.notes.append(f"none is kept for evaluation: {fraction:g} of {count} is less than one question")
    # a question that one source keeps for evaluation is not trained on through another
    everywhere = set[str]().union(*chosen)
    return [
        (
            source,
            [c for c in source.source.conversations if _question(c) not in everywhere],
            [c for c in source.source.conversations if _question(c) in everywhere],
        )
        for source in sources
    ]


def _choose_questions(conversations: Sequence[Conversation], fraction: float, seed: int) -> set[str]:
    """Questions whose conversations make up about `fraction`; a question's place depends on it and the seed alone."""
    counts = Counter(_question(conversation) for conversation in conversations)
    wanted, taken = fraction * len(conversations), 0
    chosen = set()
    for question in sorted(counts, key=lambda text: hashlib.sha256(f"{seed}\x00{text}".encode()).digest()):
        # one that is asked too often to fit is passed over
        if taken + counts[question] / 2 <= wanted:
            chosen.add(question)
            taken += counts[question]
    return chosen
