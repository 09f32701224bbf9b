"""A model's own answers to the prompts of a source, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from lory.batch import Answer, answer_batch, gather, plan_batches, seeded
from lory.evaluate.records import Question, Record, describe_messages
from lory.generate import GenerationOptions, decode_text
from lory.types import Media

if TYPE_CHECKING:
    from lory.assistant import Assistant
    from lory.decoding.loop import Verdict

Kind = Literal["answer", "continuation", "record"]


@dataclass
class Prediction:
    """A target, what the model wrote in its place, and how they compare."""

    source: str
    kind: Kind
    """An answer to a prompt, the continuation of a text, or a record that was read only."""
    place: str
    """File and line of the record."""
    prompt: list[dict[str, Any]] | str
    target: str
    answer: str | None = None
    sample: int = 0
    """Its number among the answers to the same prompt."""
    tokens: int = 0
    """Of the answer, without its end."""
    cut: bool = False
    """The answer was ended by its length, not by the model."""
    scores: dict[str, float] = field(default_factory=dict)
    parroting: list[str] = field(default_factory=list)
    """The kinds of parroting that the answer is part of."""
    images: tuple[Media, ...] = field(default=(), repr=False)
    """Those of the prompt, in their order."""
    question: Question | None = field(default=None, repr=False)
    answer_ids: tuple[int, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        return {key: value for key, value in vars(self).items() if key not in ("images", "question", "answer_ids")}


def answer_questions(
    assistant: Assistant,
    name: str,
    questions: Sequence[Question],
    options: GenerationOptions,
    answers: int,
    batch_size: int,
    stopped: Callable[[], bool],
    progress: Callable[[int, int], None],
    fixed_length: bool = False,
) -> list[Prediction]:
    """Predictions in the order of `questions`, `answers` of them for each.

    Args:
        name: of the source.
        stopped: asked at each token; what was answered in whole by then is returned.
        progress: called with (done, total) answers.
        fixed_length: each answer has `options.max_new_tokens` tokens: the model cannot end it.

    Raises:
        LoryError: the generation failed, as for want of memory.
    """
    found: dict[tuple[int, int], Prediction] = {}
    samples: Counter[int] = Counter()
    several = [question for question in questions for _ in range(answers)]
    order = {id(question): number for number, question in enumerate(questions)}
    for batch, given in _answer_all(assistant, several, options, batch_size, stopped, fixed_length):
        for question, answer in zip(batch, given, strict=True):
            place = order[id(question)]
            sample = samples[place]
            samples[place] += 1
            cut = answer.reason == "length" and not fixed_length
            found[place, sample] = _describe(assistant, name, question, sample, answer.ids, cut)
        progress(len(found), len(several))
    return [found[key] for key in sorted(found)]


def _answer_all(
    assistant: Assistant,
    questions: Sequence[Question],
    options: GenerationOptions,
    batch_size: int,
    stopped: Callable[[], bool],
    fixed_length: bool,
) -> Iterator[tuple[list[Question], list[Answer]]]:
    """Batches of questions with their answers, until it is stopped; the order of the questions is kept roughly.

    So when an evaluation is stopped early, what was answered is a fair part of the source, not its shortest prompts.
    """
    model, ends = assistant.model, assistant.terminators
    watch = _Endless(ends) if fixed_length else None
    number = 0
    for window in gather(questions, lambda question: question.make_prompt(assistant), batch_size):
        prompts = [prompt for _, prompt in window]
        for places in plan_batches(model, prompts, options, batch_size):
            if stopped():
                return
            # equal prompts in equal batches must not draw the same
            own = seeded(options, number)
            number += 1
            batch = [prompts[place] for place in places]
            answers = answer_batch(model, assistant.tokenizer, batch, own, ends, watch, stopped)
            if answers is None:
                return
            yield [window[place][0] for place in places], answers


class _Endless:
    """A watcher that keeps the model from ending an answer."""

    def __init__(self, terminators: Sequence[int]) -> None:
        self.terminators = list(terminators)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> Verdict:
        from lory.decoding.loop import Verdict

        # some terminators lie beyond the output's rows
        ends = [token for token in self.terminators if token < scores.shape[1]]
        scores = scores.clone()
        scores[:, ends] = -torch.inf
        return Verdict(scores=scores)


def _describe(
    assistant: Assistant, name: str, question: Question, sample: int, ids: Sequence[int], cut: bool
) -> Prediction:
    is_text = isinstance(question.prompt, str)
    return Prediction(
        source=name,
        kind="continuation" if is_text else "answer",
        place=question.record.conversation.where,
        prompt=question.prompt,
        target=question.target,
        answer=decode_text(assistant.tokenizer, ids),
        sample=sample,
        tokens=len(ids),
        cut=cut,
        images=question.record.images,
        question=question,
        answer_ids=tuple(ids),
    )


def describe_record(name: str, record: Record) -> Prediction:
    """A record that was read, but not answered."""
    conversation = record.conversation
    place = conversation.where
    if conversation.text is not None:
        return Prediction(name, "record", place, "", conversation.text)
    prompt = describe_messages(conversation.prompt)
    return Prediction(name, "record", place, prompt, conversation.messages[-1].content, images=record.images)
