"""A row draws from the distribution that transformers' processors leave."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lory.generate import GenerationOptions
from lory.server.sampling import Sampler, Sampling, keep_likeliest

LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2


def draw(logits: torch.Tensor, times: int = 1, seed: int = 0, **options: float) -> list[int]:
    sampler = Sampler(Sampling(GenerationOptions(do_sample=True, **options)), [1], seed, logits.device)
    return [sampler.choose(logits) for _ in range(times)]


@pytest.mark.parametrize("size", [40, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_transformers(size: int, top_p: float) -> None:
    # flat, so that the likeliest thousand are not enough
    scores = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.3
    assert torch.equal(
        keep_likeliest(scores, top_p), TopPLogitsWarper(top_p)(torch.zeros(1, 1).long(), scores[None])[0]
    )


def test_tokens_come_as_often_as_their_probability_says() -> None:
    times = 4000
    counts = Counter(draw(LOGITS, times, temperature=0.8, top_k=12, top_p=0.95, min_p=0.02))
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)]
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1).long(), LOGITS[None].clone())[0].softmax(-1)
    for token, share in enumerate(expected.tolist()):
        if share == 0:
            assert counts[token] == 0
        assert abs(counts[token] / times - share) < 4 * (share / times) ** 0.5 + 1e-3


def test_a_seed_repeats_its_draws() -> None:
    assert draw(LOGITS, 30, 5) == draw(LOGITS, 30, 5) != draw(LOGITS, 30, 6)


def test_penalties_and_bias_change_the_choice() -> None:
    likeliest = int(LOGITS.argmax())
    greedy = GenerationOptions(do_sample=False)
    for sampling in (
        Sampling(greedy.model_copy(update={"repetition_penalty": 50.0})),
        Sampling(greedy.model_copy(update={"presence_penalty": 99.0})),
        Sampling(greedy.model_copy(update={"frequency_penalty": 99.0})),
    ):
        sampler = Sampler(sampling, [0], 0, LOGITS.device)
        assert not sampler.is_plain
        assert sampler.choose(LOGITS) == likeliest
        sampler.take(likeliest)
        assert sampler.choose(LOGITS) != likeliest
    biased = Sampler(Sampling(greedy, logit_bias={7: 100.0}), [0], 0, LOGITS.device)
    assert biased.choose(LOGITS) == 7
    assert int(LOGITS.argmax()) == likeliest
