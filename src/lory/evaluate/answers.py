"""A model's own answers to the prompts of a source, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from lory.evaluate.records import Question, Record, make_batches
from lory.generate import GenerationOptions, decode_text, stream_steps
from lory.runtime import LoryError

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
    question: Question | None = field(default=None, repr=False)
    answer_ids: tuple[int, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        return {key: value for key, value in vars(self).items() if key not in ("question", "answer_ids")}


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
    total = len(several)
    for number, batch in enumerate(make_batches(several, batch_size)):
        if stopped():
            break
        # equal prompts in equal batches must not draw the same
        seeded = options if options.seed is None else options.model_copy(update={"seed": options.seed + number})
        generated = _generate(assistant, [question.prompt_ids for question in batch], seeded, stopped, fixed_length)
        if generated is None:
            break
        for question, (ids, cut) in zip(batch, generated, strict=True):
            place = order[id(question)]
            sample = samples[place]
            samples[place] += 1
            found[place, sample] = _describe(assistant, name, question, sample, ids, cut and not fixed_length)
        progress(len(found), total)
    return [found[key] for key in sorted(found)]


def _generate(
    assistant: Assistant,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    stopped: Callable[[], bool],
    fixed_length: bool,
) -> list[tuple[list[int], bool]] | None:
    """The ids of each answer and whether it was cut by its length; None if it was stopped."""
    ends = assistant.terminators
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    watch = _Endless(ends) if fixed_length else None
    try:
        for step in stream_steps(assistant.model, prompts, options, ends, watch):
            for row, token in enumerate(step.tokens):
                if token in ends:
                    ended[row] = True
                elif token is not None:
                    answers[row].append(token)
            if stopped():
                return None
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise LoryError(
            f"The answers could not be generated: {reason}; a lower --batch-size takes less memory."
        ) from error
    return [(answer, not end) for answer, end in zip(answers, ended, strict=True)]


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
        question=question,
        answer_ids=tuple(ids),
    )


def describe_record(name: str, record: Record) -> Prediction:
    """A record that was read, but not answered."""
    conversation = record.conversation
    place = conversation.where
    if conversation.text is not None:
        return Prediction(name, "record", place, "", conversation.text)
    prompt = [message.to_dict() for message in conversation.prompt]
    return Prediction(name, "record", place, prompt, conversation.messages[-1].content)
