"""Answers as they grow: the text so far with how much it repeats itself, of one assistant or of two side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lory.assistant import Assistant
from lory.generate import Ending, GenerationOptions
from lory.metrics.repetition import repetition_scores

SECONDS = 0.05
"""The shortest time between two looks at an answer; a page can't be drawn more often."""
STOPPED = "stopped"
"""The ending of an answer that a person has stopped."""


@dataclass(frozen=True)
class Answer:
    """An answer so far."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    """`lory.metrics.repetition.repetition_scores` of its tokens, as in a run's sample chats."""
    ending: str = ""
    """Empty while it grows."""


def stream_answer(
    assistant: Assistant,
    messages: Sequence[Mapping[str, Any]],
    options: GenerationOptions,
    is_stopped: Callable[[], bool] = lambda: False,
    every: float = SECONDS,
) -> Generator[Answer, None, None]:
    """Yield the answer as it grows, the whole one last; closing the iterator stops the model.

    Args:
        is_stopped: asked after each piece; True ends the answer where it is.
        every: seconds between two of them.

    Raises:
        LoryError: whatever the assistant raises.
    """
    ending, text = Ending(), ""
    began = shown = time.monotonic()
    stream = cast("Generator[str, None, None]", assistant.stream(messages, options, ending))
    with contextlib.closing(stream):
        for piece in stream:
            text += piece
            if is_stopped():
                ending.reason = ""
                break
            if time.monotonic() - shown >= every:
                yield measure_answer(assistant, text, time.monotonic() - began)
                shown = time.monotonic()
    yield measure_answer(assistant, text, time.monotonic() - began, ending.reason or STOPPED)


def measure_answer(assistant: Assistant, text: str, seconds: float = 0.0, ending: str = "") -> Answer:
    """An answer with its length in tokens and its scores."""
    ids = assistant.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answer(text, len(ids), seconds, repetition_scores(ids), ending)


def stream_side_by_side(streams: Sequence[Iterator[Answer]]) -> Iterator[list[Answer]]:
    """Yield the answers of several streams together, each stream in turn, until all have ended."""
    latest = [Answer() for _ in streams]
    running = dict(enumerate(streams))
    while running:
        for number, stream in list(running.items()):
            if (answer := next(stream, None)) is None:
                del running[number]
                continue
            latest[number] = answer
            yield list(latest)


LEVELS = (
    (0.05, "fresh", "no repetition to speak of"),
    (0.25, "repeats", "repeats itself"),
    (1.0, "parrots", "parrots"),
)
"""Up to which portion of repeated 4-grams an answer counts as what."""


def judge(scores: Mapping[str, float]) -> tuple[str, str]:
    """The level of an answer by its ``seq_rep_4``, as a name and in words."""
    score = scores.get("seq_rep_4", 0.0)
    return next((name, words) for most, name, words in LEVELS if score <= most)
