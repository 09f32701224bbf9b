"""The training loop: one for every method, adapter and number of machines."""

from __future__ import annotations

import functools
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from lory.adapters.virtual_tokens import Leading, find_leading
from lory.data.collate import Batch, collate
from lory.data.dataset import Dataset
from lory.data.packing import pack
from lory.runtime import LoryError
from lory.training.checkpoint import Parts, Position, save_checkpoint, tidy_checkpoints
from lory.training.config import Config
from lory.training.monitor import Monitor
from lory.training.optim import TrainConfig
from lory.training.samples import answer_prompts
from lory.training.step import StepResult, evaluate_loss, train_step
from lory.types import IGNORE, Sample

if sys.platform != "win32":
    import resource


NO_LEADING = Leading()


class Interrupted(LoryError):
    """A signal asked the run to stop; it did, after a whole step and a checkpoint."""


@dataclass(frozen=True)
class Plan:
    """Which samples are learnt together: rows (lists of sample indices), and how many rows make a step."""

    rows: list[list[int]]
    batch_size: int
    accumulate: int
    processes: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        """Rows that all ranks and micro-batches of one optimizer step take together."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may have fewer rows."""
        return math.ceil(len(self.rows) / self.rows_per_step)

    def order(self, epoch: int) -> list[int]:
        """The rows' order in an epoch, a function of seed and epoch alone, so that a resumed run finds its place."""
        return _permute(len(self.rows), self.seed * 1_000_003 + epoch)

    def micro_batches(self, epoch: int, step: int, rank: int) -> list[list[int]]:
        """Sample indices of each micro-batch of this rank in an epoch's step; at the end some may be empty."""
        rows = self.order(epoch)[step * self.rows_per_step : (step + 1) * self.rows_per_step]
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        # every rank must run the same number of passes, or they would wait for each other for ever
        batches += [[] for _ in range(-len(batches) % self.processes)]
        return [[index for row in batch for index in self.rows[row]] for batch in batches[rank :: self.processes]]


@functools.lru_cache(maxsize=1)
def _permute(count: int, seed: int) -> list[int]:
    """The numbers below `count` in random order; the last answer is kept, since every step of an epoch asks."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def plan_rows(samples: Sequence[Sample], packing: bool, max_tokens: int, leading: int = 0) -> list[list[int]]:
    """Rows of the samples that have something to learn: packed, or one sample a row.

    Args:
        max_tokens: length of a packed row, and of the longest sample.
        leading: tokens of a soft prompt that each sample will begin with, for which a row is longer by once as many.
    """
    useful = [index for index, sample in enumerate(samples) if sample.supervised]
    if not packing:
        return [[index] for index in useful]
    lengths = [len(samples[index]) + leading for index in useful]
    return [[useful[i] for i in row] for row in pack(lengths, max_tokens + leading)]


def make_batches(
    samples: Sequence[Sample],
    indices: Sequence[Sequence[int]],
    padded: bool,
    pad_id: int,
    leading: Leading = NO_LEADING,
) -> list[Batch]:
    """Collated micro-batches; an empty one becomes a batch in which nothing is learnt."""
    batches = []
    for batch in indices:
        chosen = [samples[index] for index in batch]
        if not chosen:
            ids = samples[0].input_ids[:2]
            chosen = [Sample(ids, (IGNORE,) * len(ids))]
        batches.append(collate([leading.prepend(sample) for sample in chosen], padded, pad_id))
    return batches


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
        plan: Plan,
        dataset: Dataset,
        padded: bool,
        monitor: Monitor | None,
    ) -> None:
        self.folder, self.config, self.samples_config = folder, config.train, config.samples
        self.objective, self.parts, self.plan = objective, parts, plan
        self.train, self.evaluation, self.max_tokens = dataset.train, dataset.eval, config.data.max_tokens
        self.padded, self.monitor = padded, monitor
        self.accelerator = parts.accelerator
        self.total_steps = count_steps(config.train, plan)
        self.pad_id = parts.tokenizer.pad_token_id or 0
        self.saved_step = -1
        self.leading = find_leading(parts.model, packed=not padded)

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
        if self.monitor and position.step < self.total_steps:
            self.monitor.say(f"Stopped early: {position.evals_since_best} evaluations, no lower loss.")
        return position

    def _take_step(self, position: Position) -> tuple[StepResult, float]:
        start = time.perf_counter()
        indices = self.plan.micro_batches(position.epoch, position.step_in_epoch, self.accelerator.process_index)
        batches = make_batches(self.train, indices, self.padded, self.pad_id, self.leading)
        parts, limit = self.parts, self.config.max_grad_norm
        result = train_step(self.objective, batches, parts.optimizer, parts.schedule, self.accelerator, limit)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise LoryError(
                f"The loss is {result.loss} and the gradient norm {result.grad_norm} at step {position.step + 1}: the "
                "run stopped before updating the weights. Lower train.learning_rate or look at the data of this step; "
                f"the checkpoints in {self.folder} are as they were."
            )
        position.step += 1
        position.step_in_epoch += 1
        if position.step_in_epoch == self.plan.steps_per_epoch:
            position.epoch, position.step_in_epoch = position.epoch + 1, 0
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
                "memory_bytes": peak_memory(self.accelerator.device),
            },
        )

    def _look_after(self, position: Position) -> None:
        """Evaluate, answer the sample prompts and save, where this step is one for it, as the last one is."""
        if position.step == self.total_steps or position.step % self.config.eval_every_steps == 0:
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
        return position.step >= self.total_steps or (patience is not None and position.evals_since_best >= patience)

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
            answer_prompts(model, tokenizer, self.samples_config, step, self.folder, self.monitor.say)
        self.accelerator.wait_for_everyone()

    def evaluate(self, position: Position) -> None:
        """Loss, perplexity and token accuracy over all evaluation samples and per source; remembers the best."""
        if not self.evaluation:
            return
        sums = {name: self._evaluate_samples(samples) for name, samples in self.evaluation.items()}
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

    def _evaluate_samples(self, samples: Sequence[Sample]) -> torch.Tensor:
        rows = plan_rows(samples, not self.padded, self.max_tokens, len(self.leading))
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = make_batches(samples, rows[rank::processes], self.padded, self.pad_id, self.leading)
        return evaluate_loss(self.objective, batches, self.accelerator)


def count_steps(config: TrainConfig, plan: Plan) -> int:
    """Optimizer steps of the whole run."""
    steps = config.epochs * plan.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _describe(sums: torch.Tensor) -> dict[str, Any]:
    """Means from (3) sums of loss, correct and supervised tokens."""
    loss, correct, weight = sums.tolist()
    mean = loss / max(weight, 1)
    return {
        "loss": mean,
        # a perplexity beyond a float's range says no more than a very large one
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": correct / max(weight, 1),
        "supervised_tokens": int(weight),
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
