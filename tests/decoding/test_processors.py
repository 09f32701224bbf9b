"""Penalties and noise on logits: equal to literal loops over the formulas, whatever way the text grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from lory.decoding.processors import CountPenalty, LoopEscape, RepetitionPenalty, SamplingNoise, build_processors
from lory.runtime import UsageError

PROMPT, VOCABULARY = 4, 13


def grow(rows: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a processor is called with while `rows` answers grow by `steps` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, PROMPT + steps), generator=generator)
    return [(ids[:, : PROMPT + step], torch.randn(rows, VOCABULARY, generator=generator)) for step in range(steps)]


def divide(ids: list[int], scores: list[float], penalty: float) -> list[float]:
    return [
        (score * penalty if score < 0 else score / penalty) if token in ids else score
        for token, score in enumerate(scores)
    ]


@pytest.mark.parametrize("counts", ["answer", "all"])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_the_repetition_penalty_counts_what_it_is_told_to(counts: Literal["answer", "all"], window: int | None) -> None:
    processor = RepetitionPenalty(1.7, PROMPT, window, counts)
    for ids, scores in grow(rows=3, steps=12):
        rows = []
        for row, row_scores in zip(ids.tolist(), scores.tolist(), strict=True):
            counted = row[PROMPT if counts == "answer" else 0 :]
            rows.append(divide(counted[-window:] if window else counted, row_scores, 1.7))
        torch.testing.assert_close(processor(ids, scores.clone()), torch.tensor(rows))


def test_without_a_window_the_penalty_is_transformers_own() -> None:
    own, theirs = RepetitionPenalty(1.3, PROMPT), RepetitionPenaltyLogitsProcessor(1.3)
    for ids, scores in grow(rows=2, steps=6):
        torch.testing.assert_close(own(ids, scores.clone()), theirs(ids, scores.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 4])
def test_frequency_and_presence_follow_openai_s_formula(window: int | None) -> None:
    processor = CountPenalty(frequency=0.5, presence=0.25, prompt_tokens=PROMPT, window=window)
    for ids, scores in grow(rows=2, steps=12):
        expected = scores.clone()
        for row, tokens in enumerate(ids[:, PROMPT:].tolist()):
            counted = tokens[-window:] if window else tokens
            for token in range(VOCABULARY):
                number = counted.count(token)
                expected[row, token] -= number * 0.5 + (number > 0) * 0.25
        torch.testing.assert_close(processor(ids, scores.clone()), expected)


def test_a_text_may_be_cut_and_rows_may_be_exchanged() -> None:
    processor = RepetitionPenalty(2.0, 1, counts="answer")
    scores = torch.ones(1, 5)
    assert processor(torch.tensor([[0, 1, 2, 3]]), scores).tolist() == [[1, 0.5, 0.5, 0.5, 1]]
    assert processor(torch.tensor([[0, 1, 4]]), scores).tolist() == [[1, 0.5, 1, 1, 0.5]]
    assert processor(torch.tensor([[0, 1, 4], [0, 2, 2]]), scores.expand(2, 5)).tolist() == [
        [1, 0.5, 1, 1, 0.5],
        [1, 1, 0.5, 1, 1],
    ]


def test_padding_and_ids_without_a_logit_do_not_count() -> None:
    processor = RepetitionPenalty(2.0, 3, ignored=[0])
    assert processor(torch.tensor([[0, 99, 1]]), torch.ones(1, 3)).tolist() == [[1, 0.5, 1]]


def test_scores_are_not_written_to() -> None:
    scores = torch.ones(1, 5)
    RepetitionPenalty(2.0, 0)(torch.tensor([[1]]), scores)
    CountPenalty(1.0)(torch.tensor([[1]]), scores)
    assert scores.tolist() == [[1] * 5]


def test_noise_is_repeatable_and_leaves_the_forbidden_forbidden() -> None:
    scores = torch.tensor([[0.0, -math.inf, 1.0]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    for kind in ("gumbel", "uniform"):
        first, second = (SamplingNoise(0.5, seed=3, kind=kind)(ids, scores) for _ in range(2))
        assert torch.equal(first, second)
        assert first[0, 1] == -math.inf
        assert first[0, 0] != 0
        assert not torch.equal(first, SamplingNoise(0.5, seed=4, kind=kind)(ids, scores))
    uniform = SamplingNoise(0.5, kind="uniform")(ids, torch.zeros(1, 10_000))
    assert 0.49 < uniform.abs().max() <= 0.5


def test_the_likeliest_under_gumbel_noise_is_a_sample() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = SamplingNoise(1.0)(torch.zeros(1, 1), logits.expand(20_000, 3)).argmax(dim=-1)
    shares = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(dim=-1), atol=0.015, rtol=0)


def test_an_escape_touches_only_the_row_that_looped() -> None:
    escape, scores = LoopEscape(rows=2, sampled=2, top_k=2), torch.tensor([[3.0, 2.0, 1.0, -1.0]] * 2)
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert torch.equal(escape(ids, scores), scores)
    escape.penalize(0, [0, 3])
    escape.penalize(0, [0])
    torch.testing.assert_close(escape(ids, scores), torch.tensor([[3 / 1.69, 2, 1, -1.3], [3, 2, 1, -1]]))
    escape.lead_out(1, 0)
    led = escape(ids, scores)[1]
    assert led[0] == led[3] == -math.inf
    assert led[1:3].isfinite().all()
    escape.move_on(1)
    assert escape(ids, scores)[1, 0].isfinite()
    escape.move_on(1)
    assert torch.equal(escape(ids, scores)[1], scores[1])


@dataclass
class Options:
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
    repetition_counts: Literal["answer", "all"] = "all"
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    sampling_noise: float = 0.0
    seed: int | None = None


def test_only_what_is_asked_for_is_built() -> None:
    assert build_processors(Options(), PROMPT) == LogitsProcessorList()
    built = build_processors(Options(1.2, 8, "answer", 0.1, 0.0, 0.3), PROMPT)
    assert [type(processor) for processor in built] == [RepetitionPenalty, CountPenalty, SamplingNoise]


@pytest.mark.parametrize(
    "options", [Options(repetition_penalty=0), Options(1.2, repetition_window=0), Options(sampling_noise=-1)]
)
def test_impossible_options_are_refused(options: Options) -> None:
    with pytest.raises(UsageError, match="was given"):
        build_processors(options, PROMPT)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def test_generate_takes_the_processors(model: Any) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "eos_token_id": None}
    own = build_processors(Options(repetition_penalty=1.5), 4)
    ours = model.generate(prompt, do_sample=False, logits_processor=own, **arguments)
    assert torch.equal(ours, model.generate(prompt, do_sample=False, repetition_penalty=1.5, **arguments))


@pytest.mark.parametrize(
    ("name", "value", "processor"),
    [
        ("temperature", 0.5, "TemperatureLogitsWarper"),
        ("top_k", 7, "TopKLogitsWarper"),
        ("top_p", 0.8, "TopPLogitsWarper"),
        ("min_p", 0.1, "MinPLogitsWarper"),
        ("typical_p", 0.9, "TypicalLogitsWarper"),
        ("no_repeat_ngram_size", 3, "NoRepeatNGramLogitsProcessor"),
    ],
)
def test_the_rest_is_transformers_own_by_the_same_name(model: Any, name: str, value: float, processor: str) -> None:
    built: list[str] = []

    def decode(model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: Any) -> torch.Tensor:
        built.extend(type(item).__name__ for item in logits_processor)
        return input_ids

    options = {"do_sample": True, "max_new_tokens": 1, "top_k": 0, name: value}
    model.generate(torch.tensor([[5, 6]]), custom_generate=decode, **options)
    assert processor in built


def test_noise_without_a_seed_is_drawn_anew() -> None:
    ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 50)
    first, second = (build_processors(Options(sampling_noise=1.0), 0)(ids, scores.clone()) for _ in range(2))
    assert not torch.equal(first, second)
