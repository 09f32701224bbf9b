"""An evaluation: sources in, scores and predictions out."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lory.adapters.prompt import virtual_length
from lory.data.encoding.encode import Encoder, LossOn
from lory.data.encoding.pictures import ImageRules
from lory.data.sources.read import SourceConfig
from lory.data.vision.images import ImageLimits
from lory.evaluate.answers import Prediction, answer_questions, describe_record
from lory.evaluate.page import draw_page
from lory.evaluate.prediction import Predictor, Totals
from lory.evaluate.records import Question, Source, list_prefixes, list_questions, read_sources
from lory.evaluate.scores import score_answers, score_classes, score_each, score_repetition
from lory.generate import GenerationOptions
from lory.runtime import UsageError, write_aside, write_json, write_text

if TYPE_CHECKING:
    from lory.assistant import Assistant

Progress = Callable[[str, int, int], None]
"""Called with what is done, and how far: (title, done, total)."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    max_tokens: int = 2048
    """Longest sample, in tokens; the model's context if that is shorter."""
    most_records: int | None = None
    """Records drawn of each source, windows of its plain texts that are read, and prefixes continued; None: all."""
    loss_on: LossOn = "assistant"
    generate: bool = False
    """Let the model answer the prompts of chats."""
    answers: int = 1
    """Answers to each prompt; several need sampling."""
    options: GenerationOptions = field(default_factory=lambda: GenerationOptions(max_new_tokens=256))
    continuation: tuple[int, int] | None = None
    """Continue plain texts greedily: tokens of a prefix and of its continuation."""
    batch_size: int = 8
    """Prompts that are answered together."""
    fetch_images: bool = False
    """Whether images on the web are fetched."""

    def check(self) -> None:
        """Raises UsageError where the settings cannot be."""
        if self.max_tokens < 8:
            raise UsageError(f"max_tokens = {self.max_tokens} was given; samples have 8 tokens or more.")
        if self.answers > 1 and not self.options.do_sample:
            raise UsageError(f"{self.answers} answers to each prompt need sampling; without, they are all the same.")
        if self.continuation and min(self.continuation) < 1:
            raise UsageError(f"{self.continuation} was given for prefix and continuation; both have 1 token or more.")


@dataclass
class Evaluation:
    """What was measured."""

    model: str
    sources: dict[str, dict[str, Any]]
    """Per source: records, dropped, notes, `prediction`, and where the model wrote, `answers`, `continuations`."""
    total: dict[str, Any]
    """The same over all sources."""
    predictions: list[Prediction]
    notes: list[str]
    interrupted: bool
    """It was stopped before the end; the scores are those of what was done."""

    def to_dict(self) -> dict[str, Any]:
        """scores.json; numbers that JSON has not, as an infinite perplexity, are null."""
        values = {"model": self.model, "interrupted": self.interrupted, "notes": self.notes}
        return _finite({**values, "sources": self.sources, "all": self.total})

    def write(self, folder: Path, scores: dict[str, Any] | None = None) -> None:
        """Write scores.json, predictions.jsonl and predictions.html into a new folder.

        Args:
            scores: what scores.json holds, if not `to_dict`.

        Raises:
            LoryError: the disk is full, or the place cannot be written to.
        """
        with write_aside(folder) as aside:
            write_json(aside / "scores.json", scores or self.to_dict())
            lines = (json.dumps(_finite(p.to_dict()), ensure_ascii=False) + "\n" for p in self.predictions)
            write_text(aside / "predictions.jsonl", "".join(lines))
            write_text(aside / "predictions.html", draw_page(self.model, self.predictions))


def evaluate(
    assistant: Assistant,
    sources: Sequence[SourceConfig],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how a model predicts the sources' texts and, if wanted, how it answers their prompts.

    Ctrl-C ends the measuring, and what was measured by then is returned; a second one breaks off.

    Raises:
        UsageError: settings that cannot be, bad data, or nothing to evaluate on.
        LoryError: the model failed while generating.
    """
    settings = settings or Settings()
    settings.check()
    context = _context(assistant)
    if settings.continuation and context is not None and sum(settings.continuation) > context:
        raise UsageError(
            f"{sum(settings.continuation)} tokens of prefix and continuation exceed the context, {context}."
        )
    longest = settings.max_tokens if context is None else min(settings.max_tokens, context)
    rules = ImageRules(limits=ImageLimits(allow_urls=settings.fetch_images))
    ends, reader = assistant.terminators, assistant.reader
    encoder = Encoder(assistant.tokenizer, ends, longest, "drop", settings.loss_on, reader, rules)
    read = read_sources(sources, encoder, settings.most_records)
    # a prompt may be as long as the context, less the first token of the answer
    work = _Work(assistant, settings, encoder, (context or math.inf) - 1, progress or _say_nothing)
    training = assistant.model.training
    assistant.model.eval()
    try:
        with _interruptible() as work.stopped:
            return work.run(read, longest)
    finally:
        assistant.model.train(training)


class _Work:
    """An evaluation under way."""

    def __init__(
        self, assistant: Assistant, settings: Settings, encoder: Encoder, most_prompt: float, progress: Progress
    ) -> None:
        self.assistant, self.settings, self.encoder = assistant, settings, encoder
        self.most_prompt, self.progress = most_prompt, progress
        self.stopped: Callable[[], bool] = lambda: False
        self.notes: list[str] = []

    def run(self, sources: Sequence[Source], max_tokens: int) -> Evaluation:
        """All of it, source by source."""
        assistant = self.assistant
        predictor = Predictor(assistant.model, max_tokens, assistant.tokenizer.pad_token_id or 0, assistant.reader)
        scores: dict[str, dict[str, Any]] = {}
        everything, totals = [], Totals()
        for source in sources:
            own = predictor.measure(source.records, self.stopped, self._bar(f"Reading {source.name}"))
            predictions = self._answer(source)
            totals.merge(own)
            everything += predictions
            read = {"records": len(source.records), "read": source.read, "dropped": dict(source.dropped)}
            scores[source.name] = {**read, "notes": source.notes, **self._score(own, predictions, per_source=True)}
        total = {"records": sum(len(source.records) for source in sources), **self._score(totals, everything)}
        stopped = self.stopped()
        return Evaluation(self.assistant.name, scores, total, everything, self.notes, stopped)

    def _bar(self, title: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(title, done, total)

    def _answer(self, source: Source) -> list[Prediction]:
        """What the model writes for a source; a record for which it writes nothing is there without an answer."""
        settings = self.settings
        predictions: list[Prediction] = []
        if settings.generate:
            most = int(min(self.most_prompt, 2**31))
            questions = list_questions(source, self.encoder, most)
            predictions += self._generate(source, questions, settings.options, settings.answers)
        if settings.continuation:
            questions = list_prefixes(source, self.encoder, settings.continuation, settings.most_records)
            changes = {"do_sample": False, "max_new_tokens": settings.continuation[1]}
            options = settings.options.model_copy(update=changes)
            predictions += self._generate(source, questions, options, 1, fixed_length=True)
        score_each(predictions)
        answered = {id(prediction.question.record) for prediction in predictions if prediction.question}
        for record in source.records:
            if id(record) not in answered and record.supervised:
                alone = describe_record(source.name, record)
                alone.scores |= record.scores()
                predictions.append(alone)
        return predictions

    def _generate(
        self,
        source: Source,
        questions: Sequence[Question],
        options: GenerationOptions,
        answers: int,
        fixed_length: bool = False,
    ) -> list[Prediction]:
        title = f"{'Continuing' if fixed_length else 'Answering'} {source.name}"
        return answer_questions(
            self.assistant,
            source.name,
            questions,
            options,
            answers,
            self.settings.batch_size,
            self.stopped,
            self._bar(title),
            fixed_length,
        )

    def _score(self, totals: Totals, predictions: Sequence[Prediction], per_source: bool = False) -> dict[str, Any]:
        scores: dict[str, Any] = {"prediction": totals.scores()}
        if answers := [p for p in predictions if p.kind == "answer"]:
            # the marks on the predictions are those of the whole, which is scored last
            scores["answers"] = score_answers(answers, self.notes)
            # classes of several sources have nothing in common
            if per_source and (classes := score_classes(answers, self.notes)):
                scores["answers"]["classification"] = classes
        if continuations := [p for p in predictions if p.kind == "continuation"]:
            scores["continuations"] = {"continuations": len(continuations), **score_repetition(continuations)}
        return scores


def _context(assistant: Assistant) -> int | None:
    """Tokens that the model can read, beside its soft prompt; None: its config does not say."""
    model = assistant.model
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - virtual_length(model)


def _say_nothing(title: str, done: int, total: int) -> None:
    pass


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed while the block runs; pressed again, it breaks off."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
