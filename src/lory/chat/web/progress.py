"""A run that is being trained, as it can be read from its folder at any moment: how far it is, curves, sample chats."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory.models.resolve import find_run
from lory.runtime import UsageError

_QUIET_SECONDS = 120.0
"""A run that is not done and has written nothing for so long is said to be quiet, or for 20 of its steps if longer."""

VALUES = ("loss", "token_accuracy", "learning_rate", "grad_norm")
"""What has a curve."""


@dataclass(frozen=True)
class Point:
    """A value at a step."""

    step: int
    value: float
    series: str
    """training or evaluation."""


@dataclass(frozen=True)
class Sample:
    """The answer to a sample prompt at a step."""

    step: int
    prompt: str
    answer: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class RunState:
    """What a run's folder says."""

    folder: Path
    steps: int | None
    """Optimizer steps of the whole run; None where it does not say."""
    log: tuple[Mapping[str, Any], ...]
    samples: tuple[Sample, ...]
    idle_seconds: float
    """Since something was written."""

    @property
    def last(self) -> Mapping[str, Any]:
        """The last line about training steps."""
        return next((line for line in reversed(self.log) if "eval" not in line), {})

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.last.get("step", 0))

    @property
    def share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        return min(self.step / self.steps, 1.0) if self.steps else 0.0

    @property
    def status(self) -> str:
        """How the run stands, in a word or two."""
        if self.steps is not None and self.step >= self.steps:
            return "finished"
        # some evaluations and saves take as long as many steps
        pace = float(self.last.get("elapsed_seconds") or 0.0) / max(self.step, 1)
        if self.idle_seconds > max(_QUIET_SECONDS, 20 * pace):
            return "quiet, probably stopped"
        return "training" if self.log else "starting"

    def points(self, value: str) -> list[Point]:
        """The curve of one of `VALUES`; what is no number is left out."""
        found: list[Point] = []
        for line in self.log:
            series, values = ("evaluation", line["eval"]) if "eval" in line else ("training", line)
            number = values.get(value) if isinstance(values, Mapping) else None
            if isinstance(number, int | float) and math.isfinite(number):
                found.append(Point(int(line["step"]), float(number), series))
        return found

    def chats(self) -> dict[str, list[Sample]]:
        """The sample answers by prompt, the newest first."""
        chats: dict[str, list[Sample]] = {}
        for sample in reversed(self.samples):
            chats.setdefault(sample.prompt, []).append(sample)
        return dict(reversed(chats.items()))


def read_run(run: Path) -> RunState:
    """The state of the run in a folder, or of the newest one below it.

    Raises:
        UsageError: there is no run.
    """
    folder = find_run(run)
    samples = [sample for line in _read_lines(folder / "samples.jsonl") if (sample := _read_sample(line))]
    written = [_changed(folder / name) for name in ("log.jsonl", "samples.jsonl", "config.yaml")]
    return RunState(
        folder,
        _read_steps(folder),
        tuple(_read_lines(folder / "log.jsonl")),
        tuple(samples),
        time.time() - max(written),
    )


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _read_steps(folder: Path) -> int | None:
    try:
        steps = json.loads((folder / "data.json").read_text(encoding="utf-8")).get("steps")
    except (OSError, ValueError, AttributeError):
        # a run is looked at whatever state it is in
        return None
    return steps if isinstance(steps, int) else None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects with a step in a JSONL file; one that is being written, or that a crash has torn, is passed over."""
    if not path.exists():
        return
    try:
        raw_lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"Could not read {path}: {error.strerror}.") from error
    for raw in raw_lines:
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _read_sample(line: Mapping[str, Any]) -> Sample | None:
    prompt, answer, scores = line.get("prompt"), line.get("answer"), line.get("repetition")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return None
    return Sample(line["step"], prompt, answer, scores if isinstance(scores, Mapping) else {})
