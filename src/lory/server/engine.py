"""The engine of a server: one thread that owns the model and decodes all answers together, one token at a step.

In each turn it drops what nobody waits for any more, reads some tokens of the next prompt, and takes one step with
every running answer. So a request joins as soon as there is a place and its prompt is read, an answer that ends leaves
at once, and a long prompt holds up the others by a few tokens' time only. Contrastive search, which looks at several
tokens for each that it takes, goes on beside the batch, a token of each such answer in each turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from lory.runtime import LoryError, UsageError, log
from lory.server.alone import Tokens, decode_alone, search_contrastively
from lory.server.answers import Answer, score
from lory.server.jobs import Failure, Job, PromptRead
from lory.server.kept import KeptTexts
from lory.server.limits import Limits
from lory.server.metrics import ServerMetrics
from lory.server.runner import Prompt, Runner
from lory.server.text import ScoredToken

T = TypeVar("T")

# Prompt tokens read at a time where no answer waits for its next token
_READ_ALONE = 512
_BROKEN = "The model failed; see the server's log."
_STOPS = "The server is shutting down."
# What a model's forward raises, as when memory runs out, or when tokens stand where it expects no such ones; a request
# must not end the thread that all share
_FAILURES = (
    *(RuntimeError, ValueError, MemoryError, LoryError),
    *(TypeError, AttributeError, IndexError, KeyError, AssertionError, StopIteration),
)


class Refused(LoryError):
    """The engine does not take a job."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    """Decodes jobs; `submit`, `cancel` and `call` may be used from any thread.

    Args:
        runner: the model; from `start` on it belongs to the engine's thread.
    """

    def __init__(self, runner: Runner, limits: Limits, metrics: ServerMetrics) -> None:
        self.runner, self.limits, self.metrics = runner, limits, metrics
        self._device = runner.model.device
        self._kept = KeptTexts(limits.kept_tokens)
        self._waiting: deque[Job] = deque()
        self._reading: tuple[Job, Prompt, list[ScoredToken]] | None = None
        self._running: list[Answer] = []
        self._alone: list[tuple[Answer, Tokens]] = []
        self._calls: deque[tuple[Callable[[], object], Future[Any]]] = deque()
        self._retired: set[int] = set()
        self._wake = threading.Condition()
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lory-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not (self._draining or self._stopping)

    @property
    def is_idle(self) -> bool:
        """Whether there is no job."""
        with self._wake:
            return not (self._waiting or self._reading or self._running or self._alone)

    def submit(self, job: Job) -> None:
        """Take a job into the queue.

        Raises:
            Refused: the queue is full, the adapter has been removed, or the server is to stop.
        """
        with self._wake:
            if not self.is_healthy:
                reason = _STOPS if self._thread.is_alive() else _BROKEN
                raise Refused(503, reason)
            if job.adapter in self._retired:
                raise Refused(404, "The model was removed.")
            taken = sum(waiting.choices for waiting in self._waiting) + self._count_taken()
            if taken + job.choices > self.limits.max_batch + self.limits.queue:
                raise Refused(429, f"The queue is full with {len(self._waiting)} requests; try again later.")
            if job.inputs and self._count_image_bytes(job) > self.limits.image_memory_bytes:
                raise Refused(429, "The queue is full of images; try again later, or make them smaller.")
            self._waiting.append(job)
            self.metrics.waiting.set(len(self._waiting))
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; it leaves before the next step."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the engine's thread, between two steps."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise Refused(503, _STOPS if self._stopping else _BROKEN)
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def retire(self, adapter: int) -> None:
        """Take no more jobs for an adapter, and remove it from the bank when the last one is done."""
        with self._wake:
            self._retired.add(adapter)
            self._wake.notify()

    def drain(self) -> None:
        """Take no more jobs; those that are there go on."""
        self._draining = True

    def close(self) -> None:
        """Stop the thread; what is still there fails."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    # What follows runs in the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        finally:
            # also after an error that nobody foresaw: no one may wait for ever
            with self._wake:
                self._stopping = True
            self._fail_all(_STOPS if self._draining else _BROKEN)
            for _, future in self._calls:
                future.set_exception(Refused(503, _STOPS if self._draining else _BROKEN))

    def _wait(self) -> bool:
        """Wait until there is something to do; whether to go on."""
        with self._wake:
            while self.is_idle and not (self._calls or self._stopping or self._can_remove()):
                self._wake.wait()
            return not self._stopping

    def _turn(self) -> None:
        while self._calls:
            self._answer_call(*self._calls.popleft())
        self._remove_retired()
        self._sweep()
        try:
            self._read()
            if self._running:
                self._step()
        except _FAILURES as error:
            # as when memory runs out; whose fault it is can't be told
            log.error("The model failed: %s", error, exc_info=error)
            self._fail_all(_BROKEN, status=500)
        for answer, tokens in self._alone[:]:
            # another answer of its job may have failed
            if (answer, tokens) in self._alone:
                self._step_alone(answer, tokens)
        self.metrics.running.set(len(self._running) + len(self._alone))
        self.metrics.waiting.set(len(self._waiting))

    def _answer_call(self, function: Callable[[], object], future: Future[Any]) -> None:
        try:
            future.set_result(function())
        except _FAILURES as error:
            future.set_exception(error)
        finally:
            # nobody waits for ever, whatever comes
            if not future.done():
                future.set_exception(Refused(503, _BROKEN))

    def _count_taken(self) -> int:
        reading = self._reading
        return len(self._running) + len(self._alone) + (reading[0].choices if reading else 0)

    def _count_image_bytes(self, new: Job) -> int:
        return sum(value.nbytes for job in {*self._jobs(), new} for value in job.inputs.values())

    def _jobs(self) -> list[Job]:
        # looked at once, since other threads ask, too
        reading = [found[0]] if (found := self._reading) else []
        answers = [*self._running, *(answer for answer, _ in self._alone)]
        return [*self._waiting, *reading, *(answer.job for answer in answers)]

    def _can_remove(self) -> bool:
        bank = self.runner.bank
        return bank is not None and any(number in bank for number in self._retired)

    def _remove_retired(self) -> None:
        bank = self.runner.bank
        if bank is None or not self._can_remove():
            return
        used = {job.adapter for job in self._jobs()}
        for number in [number for number in self._retired if number in bank and number not in used]:
            bank.remove(number)
            self._kept.forget(number)

    def _sweep(self) -> None:
        """Drop what nobody waits for, and end what takes too long."""
        now = time.monotonic()
        with self._wake:
            jobs, self._waiting = list(self._waiting), deque()
            for job in jobs:
                if job.cancelled:
                    continue
                if now - job.asked_at > self.limits.queue_seconds:
                    job.deliver(Failure(503, "The request waited too long for a place; try again later."))
                else:
                    self._waiting.append(job)
        if self._reading and self._reading[0].cancelled:
            self._reading = None
        for row in reversed(range(len(self._running))):
            if self._is_over(self._running[row], now):
                self._leave(row)
        for place in reversed(range(len(self._alone))):
            if self._is_over(self._alone[place][0], now):
                self._note(self._alone.pop(place)[0])

    def _is_over(self, answer: Answer, now: float) -> bool:
        """Whether nobody waits for an answer any more, or its time is over, which it is told."""
        late = now - (answer.job.began_at or now) > self.limits.seconds
        if late and not answer.job.cancelled:
            answer.end("length")
        return late or answer.job.cancelled

    def _read(self) -> None:
        """Read some tokens of the next prompts."""
        budget = self.limits.prefill_tokens
        if not (self._running or self._alone):
            budget = max(_READ_ALONE, budget)
        while budget > 0 and (self._reading or self._begin()):
            assert self._reading is not None
            job, prompt, scored = self._reading
            before = prompt.done
            try:
                if job.prompt_logprobs:
                    self._read_scored(job, prompt, scored, budget)
                else:
                    self.runner.read(prompt, budget)
            except _FAILURES as error:
                # the others' rows were not touched
                self._reading = None
                self._fail(job, error)
                continue
            budget -= prompt.done - before
            if prompt.logits is not None:
                # what was seen is in the keys and values now
                job.inputs = prompt.inputs = {}
                going_on = self._answer(job, prompt, scored)
                with self._wake:
                    self._reading = None
                    self._running += going_on

    def _begin(self) -> bool:
        """Begin to read the next prompt, if there is one and a place for its answers."""
        while (job := self._take_next()) is not None:
            self.metrics.tokens_in.inc(len(job.prompt))
            if self._reading is None:
                # its first step reads its prompt
                continue
            prompt = self._reading[1]
            # equal tokens may stand for other images
            if not job.prompt_logprobs and not job.inputs:
                prompt.start_with(*self._kept.find(job.prompt, job.adapter))
            self.metrics.tokens_kept.inc(prompt.done)
            return True
        return False

    def _take_next(self) -> Job | None:
        """Let the first job that waits be read, or go on beside the batch; at no time is it in neither place."""
        with self._wake:
            if not self._waiting or self._count_taken() + self._waiting[0].choices > self.limits.max_batch:
                return None
            job = self._waiting.popleft()
            job.began_at = time.monotonic()
            searches = job.sampling.options.penalty_alpha is not None
            if searches or (job.inputs and not self.runner.joins_images):
                answers = [Answer(job, choice, self._device) for choice in range(job.choices)]
                decode = search_contrastively if searches else decode_alone
                self._alone += [(answer, decode(self.runner.model, answer)) for answer in answers]
            else:
                self._reading = job, Prompt(job.prompt, job.adapter, job.inputs), []
            return job

    def _read_scored(self, job: Job, prompt: Prompt, scored: list[ScoredToken], budget: int) -> None:
        if not scored:
            scored.append(ScoredToken(prompt.ids[0], None))
        first = prompt.done
        logprobs = self.runner.read_with_logits(prompt, budget).log_softmax(dim=-1)
        following = prompt.ids[first + 1 : prompt.done + 1]
        scored += [score(own, token, job.logprobs or 0) for own, token in zip(logprobs, following, strict=False)]

    def _step_alone(self, answer: Answer, tokens: Tokens) -> None:
        """Take the next token of an answer beside the batch; the first one reads its prompt."""
        try:
            self.runner.select(answer.job.adapter)
            token, logits = next(tokens)
        except StopIteration:
            answer.end("length")
        except _FAILURES as error:
            self._alone = [other for other in self._alone if other[0].job is not answer.job]
            self._fail(answer.job, error)
            return
        else:
            self._note_first(answer)
            if answer.take(token, logits):
                return
        self._alone.remove((answer, tokens))
        self._note(answer)

    def _answer(self, job: Job, prompt: Prompt, scored: list[ScoredToken]) -> list[Answer]:
        """The prompt is read: choose the first tokens; the answers that go on, each with a row."""
        assert prompt.logits is not None
        going_on = []
        if job.prompt_logprobs:
            job.deliver(PromptRead(tuple(scored)))
        for choice in range(job.choices):
            answer = Answer(job, choice, self._device)
            if job.answer_tokens == 0:
                answer.end("length")
                continue
            self._note_first(answer)
            if answer.choose(prompt.logits):
                self.runner.join(prompt)
                going_on.append(answer)
            else:
                self._note(answer)
        return going_on

    def _step(self) -> None:
        """Feed each answer's last token and choose the next."""
        logits = self.runner.step([answer.tokens[-1] for answer in self._running])
        plain = any(answer.sampler.is_plain for answer in self._running)
        likeliest = logits.argmax(dim=-1).tolist() if plain else []
        ended = []
        for row, answer in enumerate(self._running):
            if not answer.choose(logits[row], likeliest[row] if likeliest else None):
                ended.append(row)
        for row in reversed(ended):
            self._leave(row)

    def _leave(self, row: int) -> None:
        """Take an answer's row out; the last one takes its place."""
        answer = self._running[row]
        fed = self.runner.rows.lengths[row]
        if answer.choice == 0 and not answer.job.has_images and self._kept.wants(fed):
            self._kept.keep(answer.sampler.ids[:fed], answer.job.adapter, self.runner.states(row))
        self.runner.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        self._note(answer)

    def _note_first(self, answer: Answer) -> None:
        if answer.choice == 0 and not answer.tokens:
            self.metrics.first_token.observe(time.monotonic() - answer.job.asked_at)

    def _note(self, answer: Answer) -> None:
        self.metrics.tokens_out.inc(len(answer.tokens))
        self.metrics.note_answer(answer.tokens, time.monotonic() - answer.first_at)

    def _fail_all(self, message: str, status: int = 503) -> None:
        with self._wake:
            jobs = list(dict.fromkeys(self._jobs()))
            self._waiting.clear()
            self._reading, self._running, self._alone = None, [], []
        self.runner.clear()
        for job in jobs:
            job.deliver(Failure(status, message))

    def _fail(self, job: Job, error: Exception) -> None:
        """One job fails; the others go on."""
        if isinstance(error, UsageError):
            job.deliver(Failure(400, str(error)))
            return
        log.error("The model failed: %s", error, exc_info=error)
        job.deliver(Failure(500, _BROKEN))
