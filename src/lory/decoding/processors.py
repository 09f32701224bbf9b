"""Processors of logits that transformers lacks: penalties for what was said lately or often, noise, a way out of loops.

All are used like transformers' own, in a `LogitsProcessorList`. What transformers has (temperature, top_k, top_p,
min_p, typical_p, no_repeat_ngram_size) is not repeated here. The penalties keep no state: gathering and scattering a
few thousand ids takes less time than anything that goes over the vocabulary, and a text may be cut or exchanged.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from lory.runtime import UsageError

Counts = Literal["answer", "all"]
Noise = Literal["gumbel", "uniform"]


class _Counted:
    """Which columns of the ids count for a penalty.

    Args:
        start: columns at the start that do not count.
        window: only the last so many tokens count; None: all.
        ignored: tokens that never count, such as padding.
    """

    def __init__(self, start: int, window: int | None, ignored: Collection[int]) -> None:
        if window is not None and window < 1:
            raise UsageError(f"A window of {window} tokens was given for a penalty; give 1 or more, or none for all.")
        self.start, self.window, self.ignored = start, window, list(ignored)

    def select(self, input_ids: Tensor, vocabulary: int) -> Tensor:
        """Of (B, T) ids those that count, (B, n); `vocabulary` stands for what has no logit or is ignored."""
        end = input_ids.shape[1]
        start = self.start if self.window is None else max(self.start, end - self.window)
        ids = input_ids[:, start:].clamp(max=vocabulary)
        for token in self.ignored:
            ids = ids.masked_fill(ids == token, vocabulary)
        return ids


class RepetitionPenalty(LogitsProcessor):
    """CTRL's penalty: the logit of a token that occurred is divided by `penalty` if positive, else multiplied by it.

    Keskar et al., "CTRL" (arXiv 1909.05858), section 4.1. With all tokens counted and no window, it equals
    transformers' own.

    Args:
        penalty: above 1 makes repetition less likely; 1 changes nothing.
        prompt_tokens: columns of `input_ids` that are the prompt's.
        window: only the last so many tokens count.
        counts: tokens of the `answer` only, or of `all`, the prompt included.
        ignored: tokens that never count, such as the padding of a batch.
    """

    def __init__(
        self,
        penalty: float,
        prompt_tokens: int,
        window: int | None = None,
        counts: Counts = "all",
        ignored: Collection[int] = (),
    ) -> None:
        if not penalty > 0:
            raise UsageError(f"repetition_penalty = {penalty} was given; give a number above 0 (1 changes nothing).")
        self.penalty = penalty
        self._counted = _Counted(prompt_tokens if counts == "answer" else 0, window, ignored)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits, changed where one of the (B, T) ids that count is."""
        ids = self._counted.select(input_ids, scores.shape[-1])
        scores = F.pad(scores, (0, 1))
        # a token that comes twice is written twice, with the same value
        return scores.scatter(1, ids, _divide(scores.gather(1, ids), self.penalty))[:, :-1]


def _divide(scores: Tensor, penalty: float | Tensor) -> Tensor:
    """The logits, made less likely as CTRL does."""
    return torch.where(scores < 0, scores * penalty, scores / penalty)


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties: logit - count * `frequency` - (count > 0) * `presence`, counted over the answer.

    The formula is the one of OpenAI's API reference; both lie between -2 and 2 there, and any number does here.

    Args:
        prompt_tokens: columns of `input_ids` that are the prompt's, which do not count.
        window: only the last so many tokens count.
    """

    def __init__(
        self, frequency: float = 0.0, presence: float = 0.0, prompt_tokens: int = 0, window: int | None = None
    ) -> None:
        self.frequency, self.presence = frequency, presence
        self._counted = _Counted(prompt_tokens, window, ())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits, changed where one of the answer's ids is."""
        ids = self._counted.select(input_ids, scores.shape[-1])
        scores = F.pad(scores, (0, 1))
        scores = scores.scatter(1, ids, scores.gather(1, ids) - self.presence)
        # each time that a token comes adds to it
        return scores.scatter_add_(1, ids, scores.new_full(ids.shape, -self.frequency))[:, :-1]


class SamplingNoise(LogitsProcessor):
    """Adds seeded noise of a given scale to the logits.

    With Gumbel noise of scale 1, taking the likeliest token is sampling from the distribution (the Gumbel-max trick);
    of scale s, it is sampling at temperature s. Uniform noise lies in [-scale, scale]. Without a seed each use draws
    anew.
    """

    def __init__(self, scale: float, seed: int | None = 0, kind: Noise = "gumbel") -> None:
        if not scale >= 0:
            raise UsageError(f"sampling_noise = {scale} was given; give a scale of 0 (none) or more.")
        self.scale, self.seed, self.kind = scale, seed, kind
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits with noise; what is forbidden (-inf) stays so."""
        if self._generator is None:
            # torch's own generator is asked, so that a seed set before makes this repeatable, too
            seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
            self._generator = torch.Generator(scores.device).manual_seed(seed)
        return scores + self.scale * _draw(self.kind, scores, self._generator)


def _draw(kind: Noise, scores: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.empty(scores.shape, device=scores.device, dtype=torch.float32)
    if kind == "uniform":
        return noise.uniform_(-1, 1, generator=generator)
    # two logarithms of a uniform variable take a quarter of the time that `exponential_` does; log(0) is kept away
    noise.uniform_(torch.finfo(torch.float32).tiny, 1, generator=generator)
    return noise.log_().neg_().clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()


class LoopEscape(LogitsProcessor):
    """What a repetition guard does to the logits of a row that has looped; it does nothing to the others.

    Args:
        rows: B.
        seed: for sampling on.
        penalty: how much less likely (as CTRL's) `penalize` makes a token, each time that it is in a loop.
        sampled: how many tokens are sampled after a way back.
        top_k: from how many likeliest tokens.
    """

    def __init__(self, rows: int, seed: int = 0, penalty: float = 1.3, sampled: int = 32, top_k: int = 20) -> None:
        self.penalty, self.sampled, self.top_k = penalty, sampled, top_k
        self._penalties: list[dict[int, float]] = [{} for _ in range(rows)]
        self._banned: dict[int, set[int]] = {}
        self._to_sample = [0] * rows
        self._noise = SamplingNoise(1.0, seed)

    def penalize(self, row: int, tokens: Collection[int]) -> None:
        """From now on the row's `tokens` are less likely, and still less each further time."""
        for token in set(tokens):
            self._penalties[row][token] = self._penalties[row].get(token, 1.0) * self.penalty

    def lead_out(self, row: int, token: int) -> None:
        """The row's next token is not `token`, and it is sampled, as are some that follow."""
        self._banned[row] = {token}
        self._to_sample[row] = self.sampled

    def move_on(self, row: int) -> None:
        """The row has got its next token."""
        self._banned.pop(row, None)
        self._to_sample[row] = max(0, self._to_sample[row] - 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits."""
        if not (self._banned or any(self._to_sample) or any(self._penalties)):
            return scores
        scores = scores.clone()
        for row, penalties in enumerate(self._penalties):
            if penalties:
                ids = torch.tensor(list(penalties), device=scores.device)
                factors = torch.tensor(list(penalties.values()), device=scores.device, dtype=scores.dtype)
                scores[row, ids] = _divide(scores[row, ids], factors)
        for row, tokens in self._banned.items():
            scores[row, list(tokens)] = -torch.inf
        for row in (row for row, left in enumerate(self._to_sample) if left):
            least = scores[row].topk(min(self.top_k, scores.shape[-1])).values[-1]
            noisy = self._noise(input_ids[row : row + 1], scores[row : row + 1])[0]
            scores[row] = noisy.masked_fill(scores[row] < least, -torch.inf)
        return scores


class PenaltyOptions(Protocol):
    """The options that `build_processors` reads."""

    @property
    def repetition_penalty(self) -> float: ...
    @property
    def repetition_window(self) -> int | None: ...
    @property
    def repetition_counts(self) -> Counts: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def sampling_noise(self) -> float: ...
    @property
    def seed(self) -> int | None: ...


def build_processors(options: PenaltyOptions, prompt_tokens: int, ignored: Collection[int] = ()) -> LogitsProcessorList:
    """The processors of this module that `options` ask for, in the order penalties, noise; empty if none.

    `repetition_penalty` is among them, so transformers is to be given 1.0 in its place.

    Args:
        prompt_tokens: columns of `input_ids` that are the prompt's.
        ignored: tokens that are never penalized for having occurred in the prompt or answer, such as padding.

    Raises:
        UsageError: an option cannot be.
    """
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(
            RepetitionPenalty(
                options.repetition_penalty, prompt_tokens, options.repetition_window, options.repetition_counts, ignored
            )
        )
    if options.frequency_penalty or options.presence_penalty:
        processors.append(CountPenalty(options.frequency_penalty, options.presence_penalty, prompt_tokens))
    if options.sampling_noise:
        processors.append(SamplingNoise(options.sampling_noise, options.seed))
    return processors
