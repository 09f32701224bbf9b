"""The training loop: one for every method, adapter and number of machines."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from lory.data.encoding.samples import Samples
from lory.runtime import LoryError
from lory.training.checkpoint import Parts, Position, save_checkpoint, tidy_checkpoints
from lory.training.config import Config
from lory.training.continuations import continue_texts, is_sequence_step
from lory.training.feed import Batching, Feed
from lory.training.monitor import Monitor
from lory.training.samples import answer_prompts
from lory.training.step import StepResult, evaluate_loss, train_step

if sys.platform != "win32":
    import resource


class Interrupted(LoryError):
    """A signal asked the run to stop; it did, after a whole step and a checkpoint."""


class Loop:
    """A run in progress: steps, evaluations, sample chats and checkpoints, each at its time.

    Only the first rank has a `monitor`.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        objective: torch.nn.Module,
        parts: Parts,
        feed: Feed,
        batching: Batching,
        evaluation: Mapping[str, Samples],
        terminators: Sequence[int],
        monitor: Monitor | None,
    ) -> None:
        self.folder, self.config, self.samples_config = folder, config.train, config.samples
        self.unlikelihood, self.terminators = config.loss.unlikelihood, terminators
        self.objective, self.parts, self.feed, self.batching = objective, parts, feed, batching
        self.evaluation, self.monitor = evaluation, monitor
        self.accelerator = parts.accelerator
        self.total_steps = feed.total_steps
        self.saved_step = -1

    def run(self, position: Position) -> Position:
        """Go on from `position` to the end.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
            LoryError: the loss is not finite; the last good checkpoint stays.
        """
        if position.step == 0:
            self.evaluate(position)
            self.show_samples(0)
        else:
            self._tidy(position)
        self.objective.train()
        if self.monitor:
            self.monitor.begin()
        with catch_signals() as signals:
            while not self._is_over(position):
                learning_rate = self.parts.optimizer.param_groups[0]["lr"]
                result, seconds = self._take_step(position)
                self._log(position, result, learning_rate, seconds)
                self._look_after(position)
                if self._is_any(bool(signals)) and not self._is_over(position):
                    self._stop(position, signals)
        if self.monitor and not self._is_done(position):
            self.monitor.say(f"Stopped early: {position.evals_since_best} evaluations, no lower loss.")
        return position

    def _take_step(self, position: Position) -> tuple[StepResult, float]:
        start = time.perf_counter()
        rank = self.accelerator.process_index
        batches = self.feed.take(position, rank)
        # a function of seed, step and rank, so that a resumed run draws the same
        draw = torch.Generator().manual_seed(self.config.seed * 1_000_003 + position.step * 1_009 + rank)
        parts, limit = self.parts, self.config.max_grad_norm
        if is_sequence_step(self.unlikelihood, self.config.seed, position.step):
            samples = self.feed.samples(position, rank)
            batches.append(
                continue_texts(parts.model, samples, self.batching, self.unlikelihood, self.terminators, draw)
            )
        result = train_step(self.objective, batches, parts.optimizer, parts.schedule, self.accelerator, limit, draw)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise LoryError(
                f"The loss is {result.loss} and the gradient norm {result.grad_norm} at step {position.step + 1}: the "
                "run stopped before updating the weights. Lower train.learning_rate or look at the data of this step; "
                f"the checkpoints in {self.folder} are as they were."
            )
        self.feed.advance(position)
        return result, time.perf_counter() - start

    def _log(self, position: Position, result: StepResult, learning_rate: float, seconds: float) -> None:
        if not self.monitor:
            return
        self.monitor.log_step(
            position.step,
            {
                "loss": result.loss,
                "learning_rate": learning_rate,
                "grad_norm": result.grad_norm,
                "token_accuracy": result.token_accuracy,
                "tokens_per_second": result.tokens / seconds,
                "supervised_tokens": result.supervised_tokens,
                **result.parts,
                "memory_bytes": peak_memory(self.accelerator.device),
            },
        )

    def _look_after(self, position: Position) -> None:
        """Evaluate, answer the sample prompts and save, where this step is one for it, as the last one is."""
        if self._is_done(position) or position.step % self.config.eval_every_steps == 0:
            self.evaluate(position)
        last = self._is_over(position)
        if last or position.step % self.samples_config.every_steps == 0:
            self.show_samples(position.step)
        # saved when all else of this step is done, since a resumed run goes on with the next one
        best = position.best_step == position.step
        if last or best or position.step % self.config.save_every_steps == 0:
            self.save(position)

    def _is_over(self, position: Position) -> bool:
        """Whether all steps are done, or so many evaluations brought no lower loss that more would be in vain."""
        patience = self.config.early_stop_evals
        return self._is_done(position) or (patience is not None and position.evals_since_best >= patience)

    def _is_done(self, position: Position) -> bool:
        """Whether all steps are done; of a stream, whose length is not known before, perhaps sooner than planned."""
        return position.step >= self.total_steps or position.epoch >= self.config.epochs

    def _is_any(self, here: bool) -> bool:
        """Whether it is so on any rank; all ranks have to stop at the same step."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(int(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _stop(self, position: Position, signals: list[int]) -> None:
        self.save(position)
        cause = signal.Signals(signals[0]).name if signals else "a signal to another process"
        raise Interrupted(
            f"Stopped by {cause} after step {position.step} of {self.total_steps}, which is saved; "
            f"to go on: lory train {self.folder} --resume last"
        )

    def save(self, position: Position) -> None:
        """Write a checkpoint of this step unless there is one, and delete those that are too old."""
        if position.step != self.saved_step:
            save_checkpoint(self.folder, self.parts, position)
            self._tidy(position)

    def _tidy(self, position: Position) -> None:
        self.saved_step = position.step
        if self.accelerator.is_main_process:
            tidy_checkpoints(self.folder, position, self.config.keep_checkpoints)

    def show_samples(self, step: int) -> None:
        """Answer the sample prompts on the first rank."""
        if self.monitor:
            model, tokenizer = self.parts.model, self.parts.tokenizer
            say, reader = self.monitor.say, self.parts.reader
            answer_prompts(model, tokenizer, self.samples_config, step, self.folder, say, reader)
        self.accelerator.wait_for_everyone()

    def evaluate(self, position: Position) -> None:
        """Loss, perplexity and token accuracy over all evaluation samples and per source; remembers the best."""
        if not self.evaluation:
            return
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        sums = {
            name: evaluate_loss(self.objective, self.batching.evaluation(samples, rank, processes), self.accelerator)
            for name, samples in self.evaluation.items()
        }
        values = _describe(torch.stack(list(sums.values())).sum(0))
        values["sources"] = {name: _describe(value) for name, value in sums.items()}
        if not math.isfinite(values["loss"]):
            raise LoryError(
                f"The evaluation loss is {values['loss']} after step {position.step}: the weights are spoilt; lower "
                "train.learning_rate, and start anew or resume from an earlier checkpoint."
            )
        # before the first step there is nothing yet that could be best
        if position.step:
            if position.best_loss is None or values["loss"] < position.best_loss:
                position.best_loss, position.best_step, position.evals_since_best = values["loss"], position.step, 0
            else:
                position.evals_since_best += 1
        if self.monitor:
            self.monitor.log_eval(position.step, values)


def _describe(sums: torch.Tensor) -> dict[str, Any]:
    """Means from (3) sums of loss, correct and supervised tokens."""
    loss, correct, weight = sums.tolist()
    weight = weight or 1.0
    mean = loss / weight
    return {
        "loss": mean,
        # a perplexity beyond a float's range says no more than a very large one
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": correct / weight,
        "supervised_tokens": int(sums[2]),
    }


def peak_memory(device: torch.device) -> int:
    """The largest memory so far, in bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM while the block runs, so that a step can be finished; the second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        print(
            f"\n{signal.Signals(signum).name}: finishing this step and saving; once more to stop at once.",
            file=sys.stderr,
        )
        for number, handler in previous.items():
            signal.signal(number, handler)

    for wanted in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[wanted] = signal.signal(wanted, note)
        except ValueError:
            # only the main thread may set handlers; elsewhere the caller's own stay
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
