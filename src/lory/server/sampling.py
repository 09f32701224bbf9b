"""Choosing one answer's next token: its options, penalties and generator, whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor, TypicalLogitsWarper

from lory.decoding.loop import Watcher
from lory.decoding.processors import build_processors
from lory.generate import GenerationOptions

# The likeliest tokens that are looked at before all of them are sorted: 0.9 ms against 8 for 49,152 on one core
_FEW = 1024


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen."""

    options: GenerationOptions
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class Bias(LogitsProcessor):
    """Adds to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._values = list(bias), list(bias.values())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits with what is added."""
        scores = scores.clone()
        scores[:, self._tokens] += torch.tensor(self._values, device=scores.device)
        return scores


class Sampler:
    """Chooses the tokens of one answer.

    A token drawn takes one number from the answer's own generator, so equal seeds give equal answers in any batch.

    Args:
        prompt: its tokens, which count for the repetition penalty, though not for those of presence and frequency.
        seed: of the generator.
        watch: may change the scores or end the answer, as the guard against loops does.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        seed: int,
        device: torch.device,
        watch: Watcher | None = None,
    ) -> None:
        self.options = sampling.options
        self.ids = list(prompt)
        self._device, self._watch = device, watch
        self._generator = torch.Generator().manual_seed(seed)
        self._processors = list_processors(sampling, len(prompt), seed)
        typical = self.options.typical_p
        self._typical = TypicalLogitsWarper(typical) if self.options.do_sample and typical < 1 else None

    @property
    def is_plain(self) -> bool:
        """Whether it always takes the likeliest token."""
        return not (self.options.do_sample or self._processors or self._watch)

    def choose(self, logits: Tensor) -> int | None:
        """The next token by its logits (V,), fp32; `take` is to be told which token comes. None: the answer ends."""
        scores = logits
        if self._processors or self._watch is not None:
            ids = torch.tensor([self.ids], device=self._device)
            scores = self._processors(ids, scores[None].clone())[0]
            if self._watch is not None and (verdict := self._watch(ids, scores[None])) is not None:
                if verdict.stop is not None and bool(verdict.stop.any()):
                    return None
                scores = scores if verdict.scores is None else verdict.scores[0]
        if not self.options.do_sample:
            return int(scores.argmax())
        return self._draw(scores / self.options.temperature)

    def take(self, token: int) -> None:
        """The answer goes on with this token."""
        self.ids.append(token)

    def _draw(self, scores: Tensor) -> int:
        options, tokens = self.options, None
        if 0 < options.top_k < len(scores):
            scores, tokens = scores.topk(options.top_k)
        if self._typical is not None:
            scores = self._typical(torch.tensor([self.ids]), scores[None])[0]
        if options.top_p < 1:
            scores = keep_likeliest(scores, options.top_p)
        if options.min_p > 0:
            scores = scores.masked_fill(scores < scores.max() + math.log(options.min_p), -torch.inf)
        ladder = scores.double().softmax(dim=-1).cumsum(dim=0).cpu()
        height = torch.rand((), generator=self._generator, dtype=torch.float64) * ladder[-1]
        place = min(int(torch.searchsorted(ladder, height, right=True)), len(ladder) - 1)
        return place if tokens is None else int(tokens[place])


def keep_likeliest(scores: Tensor, top_p: float) -> Tensor:
    """Scores (n,) with all but the likeliest tokens that add up to `top_p` at -inf, as transformers has it.

    (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.)
    """
    probabilities = scores.softmax(dim=-1)
    for count in (_FEW, len(scores)):
        likely, tokens = probabilities.topk(min(count, len(scores)))
        before = likely.cumsum(dim=0) - likely
        if before[-1] >= top_p or len(likely) == len(scores):
            break
    kept = tokens[before < top_p]
    return torch.full_like(scores, -torch.inf).index_copy_(0, kept, scores[kept])


def list_processors(sampling: Sampling, prompt_tokens: int, seed: int = 0) -> LogitsProcessorList:
    """What changes the logits of an answer, from its tokens so far."""
    options, processors = sampling.options, LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(Bias(sampling.logit_bias))
    processors += build_processors(options.model_copy(update={"seed": seed}), prompt_tokens)
    if options.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    return processors
