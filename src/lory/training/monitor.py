"""What a person and a program see of a run: a progress bar or plain lines, log.jsonl, and TensorBoard.

A person's part goes to standard error, since standard output belongs to ``--json``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lory.runtime import UsageError, explain_os_error, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STEP_VALUES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "token_accuracy",
    "tokens_per_second",
    "supervised_tokens",
    "memory_bytes",
)

# a model's sample may hold escape sequences, which would move the cursor or colour the terminal
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Monitor:
    """Takes a run's numbers as they come and shows them; a context manager, for the main process only.

    Entering it calls `rewind(folder, start_step)`, so a resumed run continues its log and its clock. Leaving it writes
    the steps that no line has told of yet, as when a run is stopped between two lines.

    Args:
        folder: the run's folder, which exists.
        total_steps: optimizer steps of the whole run.
        start_step: the step of the checkpoint that the run resumes from.
        log_every_steps: a line is written every so many steps, and for step 1 and the last one.
        tensorboard: also write ``folder/tensorboard``, if the package is installed.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        log_every_steps: int = 10,
        tensorboard: bool = True,
    ) -> None:
        self._folder = folder
        self._total = total_steps
        self._start = self._step = start_step
        self._log_every = log_every_steps
        self._tensorboard = tensorboard
        self._unlogged: list[Mapping[str, float | int]] = []
        self._progress: Progress | None = None
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> Monitor:
        self._elapsed_before = rewind(self._folder, self._start)
        with ExitStack() as stack:
            if self._tensorboard and (writer := self._open_tensorboard()):
                self._writer = writer
                stack.callback(writer.close)
            if _is_live_terminal():
                self._progress = stack.enter_context(_make_progress())
                status = f"step {self._start}/{self._total}"
                self._task = self._progress.add_task("", total=self._total, completed=self._start, status=status)
            self._stack = stack.pop_all()
        self._entered = self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if self._unlogged:
                self._write_steps()
        self._progress = self._writer = None

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._elapsed_before + time.monotonic() - self._entered

    def begin(self) -> None:
        """Compute the time left from now on: what came before (an evaluation, say) does not come with every step."""
        self._began = time.monotonic()

    def log_step(self, step: int, values: Mapping[str, float | int]) -> None:
        """Take the numbers of optimizer step `step` (counted from 1); call it after every one.

        Args:
            values: `STEP_VALUES`, each of this step alone: loss in nats per supervised token, token_accuracy in [0, 1],
                tokens_per_second, supervised_tokens, memory_bytes. What is left out is logged as null, and other
                numbers (a part of the loss, say) are averaged as the loss is.

        Raises:
            LoryError: the log cannot be written.
        """
        self._step = step
        self._unlogged.append(dict(values))
        if self._progress:
            status = self._describe_step(values, self._estimate_remaining())
            self._progress.update(self._task, completed=step, status=status)
        if step % self._log_every == 0 or step in (1, self._total):
            self._write_steps()

    def log_eval(self, step: int, values: Mapping[str, Any]) -> None:
        """Log and show an evaluation: numbers by name, and ``sources`` with the same for each source.

        Raises:
            LoryError: the log cannot be written.
        """
        self._write({"step": step, "eval": values})
        self._write_scalars("eval", step, values)
        self.say(f"step {step}/{self._total}  evaluation  {_describe_numbers(values)}")
        for name, numbers in (values.get("sources") or {}).items():
            self.say(f"  {name}  {_describe_numbers(numbers)}")

    def say(self, text: str) -> None:
        """Show a line, above the progress bar if there is one; nothing in it is taken as markup or control code."""
        text = text.replace("\r\n", "\n").translate(_CONTROLS)
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _estimate_remaining(self) -> float | None:
        done = self._step - self._start
        if done <= 0:
            return None
        return max(self._total - self._step, 0) * (time.monotonic() - self._began) / done

    def _describe_step(self, values: Mapping[str, float | int | None], remaining: float | None) -> str:
        def show(name: str, form: str) -> str:
            value = values.get(name)
            return "-" if value is None else format(value, form)

        return (
            f"step {self._step}/{self._total}  loss {show('loss', '.3f')}  lr {show('learning_rate', '.1e')}  "
            f"{show('tokens_per_second', '.0f')} tokens/s  {_format_clock(remaining)} left"
        )

    def _write_steps(self) -> None:
        """One line for all the steps since the last line."""
        means = _average(self._unlogged)
        self._unlogged = []
        remaining = self._estimate_remaining()
        self._write(
            {
                "step": self._step,
                **means,
                "elapsed_seconds": round(self.elapsed_seconds, 3),
                "remaining_seconds": remaining if remaining is None else round(remaining, 3),
            }
        )
        self._write_scalars("train", self._step, means)
        if not self._progress:
            self.say(self._describe_step(means, remaining))

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(_replace_non_finite(entry), ensure_ascii=False, allow_nan=False)
        path = self._folder / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise explain_os_error(error, f"write {path}") from error

    def _write_scalars(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if self._writer:
            for tag, value in _flatten(name, values):
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def _open_tensorboard(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say(
                'TensorBoard is off, as its package is missing; to install it: pip install "lory-llm[tensorboard]"'
            )
            return None
        # hides what an interrupted run wrote after its last checkpoint, as `rewind` does for the log
        purge_step = self._start + 1 if self._start else None
        return SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step)


def rewind(folder: Path, step: int) -> float:
    """Take log.jsonl and samples.jsonl back to `step`: later lines go, and a last line that a crash has torn.

    Returns:
        The seconds that training had taken at the last line that is left, 0.0 if there is none.

    Raises:
        UsageError: a line before the last one is not a log line.
        LoryError: the files cannot be written.
    """
    for path in (folder / "log.jsonl", folder / "samples.jsonl"):
        if path.exists():
            kept = "".join(f"{line}\n" for line, entry in _read_lines(path) if entry["step"] <= step)
            # a file that is right stays in place, as somebody may have it open for appending
            if kept.encode() != path.read_bytes():
                write_text(path, kept)
    return max((float(entry.get("elapsed_seconds") or 0.0) for entry in read_log(folder)), default=0.0)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, without a last one that is still being written; none if there is no such file.

    Raises:
        UsageError: a line before the last one is not a log line.
    """
    path = folder / "log.jsonl"
    return [entry for _, entry in _read_lines(path)] if path.exists() else []


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line of a JSONL file, as text and as the object in it."""
    lines: list[tuple[str, dict[str, Any]]] = []
    raw_lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    for number, raw in enumerate(raw_lines, start=1):
        try:
            line = raw.decode("utf-8")
            entry = json.loads(line)
        except ValueError as error:
            if number == len(raw_lines):
                break
            raise UsageError(f"{path}, line {number} is not valid JSON; mend or remove that line.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UsageError(
                f"{path}, line {number} is no object with a whole number 'step'; mend or remove that line."
            )
        lines.append((line, entry))
    return lines


def _average(steps: Sequence[Mapping[str, float | int]]) -> dict[str, float | int | None]:
    """The numbers of several steps as those of one.

    The learning rate is the last, the supervised tokens are summed, of the memory it is the most; grad_norm and
    tokens_per_second are plain means, and the others are means over the supervised tokens.
    """
    result: dict[str, float | int | None] = dict.fromkeys(STEP_VALUES)
    for name in dict.fromkeys([*STEP_VALUES, *(name for values in steps for name in values)]):
        present = [values for values in steps if name in values]
        numbers = [values[name] for values in present]
        if not numbers:
            continue
        if name == "learning_rate":
            result[name] = numbers[-1]
        elif name == "supervised_tokens":
            result[name] = sum(numbers)
        elif name == "memory_bytes":
            result[name] = max(numbers)
        elif name in ("grad_norm", "tokens_per_second"):
            result[name] = math.fsum(numbers) / len(numbers)
        else:
            result[name] = _weighted_mean(numbers, [values.get("supervised_tokens", 1) for values in present])
    return result


def _weighted_mean(numbers: Sequence[float], weights: Sequence[float]) -> float | None:
    # a step without a supervised token has no loss to speak of, and may say so with a NaN
    pairs = [(number, weight) for number, weight in zip(numbers, weights, strict=True) if weight > 0]
    if not pairs:
        return None
    return sum(number * weight for number, weight in pairs) / sum(weight for _, weight in pairs)


def _replace_non_finite(value: Any) -> Any:
    """The value with null in the place of NaN and the infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, each with its path, as in ``eval/sources/identity/loss``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{name}/{key}", value)
        elif isinstance(value, int | float):
            yield f"{name}/{key}", value


def _describe_numbers(values: Mapping[str, Any]) -> str:
    numbers = {name.replace("_", " "): value for name, value in values.items() if isinstance(value, int | float)}
    return "  ".join(f"{name} {value if isinstance(value, int) else f'{value:.4g}'}" for name, value in numbers.items())


def _format_clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"


def _is_live_terminal() -> bool:
    # rich would also say yes to FORCE_COLOR, which a CI sets while it writes to a file
    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


def _make_progress() -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        # one text column, since a narrow terminal cuts each of them at its end
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(stderr=True),
        # drawing costs time that training wants
        refresh_per_second=2,
        # what other code prints must not be drawn over; but output that goes to a file or a pipe has to arrive there
        redirect_stdout=sys.stdout.isatty(),
    )
