"""An answer while it is decoded: its tokens become text, and its listener is told."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lory.generate import make_guard
from lory.server.jobs import FinishReason, Job, Piece
from lory.server.sampling import Sampler
from lory.server.text import ScoredToken, TextStream


class Answer:
    """An answer that is being decoded."""

    def __init__(self, job: Job, choice: int, device: torch.device) -> None:
        self.job, self.choice = job, choice
        guard = make_guard(job.tokenizer, len(job.prompt), job.sampling.options, sorted(job.terminators))
        self.sampler = Sampler(job.sampling, job.prompt, job.seed + choice, device, guard)
        self.text = TextStream(job.tokenizer, job.stops)
        self.tokens: list[int] = []
        self.first_at = time.monotonic()

    def choose(self, logits: Tensor, likeliest: int | None = None) -> bool:
        """Choose the next token by the logits (V,) and go on with it; whether the answer goes on after it.

        Args:
            likeliest: the token of the largest logit, where it is known.
        """
        token = likeliest if self.sampler.is_plain and likeliest is not None else self.sampler.choose(logits)
        if token is None:
            # cut short, as it goes round in circles
            self.end("length")
            return False
        return self.take(token, logits)

    def take(self, token: int, logits: Tensor | None) -> bool:
        """Go on with this token, chosen by the logits (V,), and tell; whether the answer goes on after it.

        Args:
            logits: for log-probabilities; None where they are not asked for.
        """
        job = self.job
        job.tokens += 1
        if not self.tokens:
            self.first_at = time.monotonic()
        self.tokens.append(token)
        self.sampler.take(token)
        finish: FinishReason | None = None
        text = ""
        if token in job.terminators:
            finish = "stop"
        else:
            scored = None
            if job.logprobs is not None and logits is not None:
                scored = score(logits.log_softmax(dim=-1), token, job.logprobs, self.text.offset)
            text = self.text.feed(token, scored)
            if self.text.stopped:
                finish = "stop"
            elif len(self.tokens) >= job.answer_tokens:
                finish = "length"
        self._tell(text, finish)
        return finish is None

    def end(self, finish: FinishReason) -> None:
        """End the answer before its time."""
        self._tell("", finish)

    def _tell(self, text: str, finish: FinishReason | None) -> None:
        if finish is not None:
            text += self.text.finish()
            # the rest of the text may hold a stop string, too
            finish = "stop" if self.text.stopped else finish
        scored = self.text.take_scored(final=finish is not None)
        if text or scored or finish:
            self.job.deliver(Piece(self.choice, text, scored, finish))


def score(logprobs: Tensor, token: int, count: int, offset: int = 0) -> ScoredToken:
    """The token with its log-probability out of those of all tokens (V,), and the `count` likeliest."""
    top = logprobs.topk(min(count, len(logprobs)))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return ScoredToken(token, float(logprobs[token]), likeliest, offset)
