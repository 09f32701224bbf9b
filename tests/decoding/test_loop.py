"""The decode loop: transformers' tokens, a cache that grows in place, and watchers that stop, steer and go back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from lory.decoding.loop import GrowingLayer, Step, Verdict, decode_steps, grow_in_place
from lory.runtime import LoryError, UsageError

PROMPT = [1, 7, 50, 9, 33]
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 6},
    "Qwen3": {},
    "GPTNeoX": {"num_key_value_heads": 4},
    "Mamba": {"state_size": 4, "time_step_rank": 3},
}


@pytest.fixture(scope="module")
def llama(random_model: Callable[..., Any]) -> Any:
    return random_model("Llama")


def inputs(*prompts: list[int]) -> dict[str, Tensor]:
    """Prompts of any lengths as rows, padded on the left."""
    length = max(map(len, prompts))
    rows = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def options(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 17, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | changes


def collect(steps: Any) -> list[list[int]]:
    """Each row's tokens."""
    rows = list(zip(*(step.tokens for step in steps if not step.back), strict=True))
    return [[token for token in row if token is not None] for row in rows]


def expect(model: Any, given: dict[str, Tensor], **changes: Any) -> list[list[int]]:
    """What `generate` continues each row with, up to its end of sequence."""
    length = given["input_ids"].shape[1]
    return model.generate(**given, **options(**changes))[:, length:].tolist()


# The same tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(random_model: Callable[..., Any], family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    given = inputs(PROMPT, [1, 9, 8, 7, 5])
    expected = expect(model, given)
    assert collect(decode_steps(model, given, options())) == expected
    assert len(set(map(tuple, expected))) == 2


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_rows_of_different_length_get_what_each_gets_alone(random_model: Callable[..., Any], family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    prompts = [[5], PROMPT, [1, 3, 9, 27, 81, 12, 36, 108]]
    alone = [collect(decode_steps(model, inputs(prompt), options()))[0] for prompt in prompts]
    assert collect(decode_steps(model, inputs(*prompts), options())) == alone


def test_an_encoder_with_a_decoder_is_served_too() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    given = {"input_ids": torch.tensor([[5, 9, 7, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = model.generate(**given, **options(max_new_tokens=9))[:, 1:].tolist()
    assert collect(decode_steps(model, given, options(max_new_tokens=9))) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"do_sample": True, "temperature": 1.4, "top_k": 9},
        {"do_sample": True, "top_p": 0.7, "top_k": 0},
        {"do_sample": True, "min_p": 0.02},
        {"do_sample": True, "typical_p": 0.6},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": 61},
        {"bad_words_ids": [[61], [8, 9]]},
        {"suppress_tokens": [3, 4, 5, 61]},
        {"use_cache": False},
    ],
    ids=lambda changes: next(iter({k: v for k, v in changes.items() if k != "do_sample"})),
)
def test_each_option_means_what_it_means_to_generate(llama: Any, changes: dict[str, Any]) -> None:
    given = inputs(PROMPT, [1, 9, 8])
    torch.manual_seed(3)
    expected = expect(llama, given, **changes)
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    assert collect(decode_steps(llama, given, options(**changes), generator)) == expected
    assert torch.equal(torch.get_rng_state(), before)  # a generator of one's own leaves the global one alone


def test_a_row_that_has_ended_gets_no_more_tokens(llama: Any) -> None:
    given = inputs(PROMPT, [1, 9, 8, 7, 5])
    first, second = expect(llama, given, no_repeat_ngram_size=1)
    at = next(at for at in range(2, 12) if first[at] not in second)
    end = first[at]
    steps = list(decode_steps(llama, given, options(no_repeat_ngram_size=1, eos_token_id=end)))
    assert [step.tokens[0] for step in steps[: at + 2]] == [*first[: at + 1], None]
    assert collect(steps)[1] == second
    assert [step.finished for step in steps] == [False] * 16 + [True]


class EndAt(StoppingCriteria):
    """Ends a row once it holds a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return (input_ids[:, len(PROMPT) :] == self.token).any(dim=1)


class Forbid(LogitsProcessor):
    """Takes a token out, in place as some of transformers' own processors do."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.token] = -torch.inf
        return scores


def test_own_criteria_and_processors_are_asked(llama: Any) -> None:
    whole = expect(llama, inputs(PROMPT), no_repeat_ngram_size=1)[0]
    own = StoppingCriteriaList([EndAt(whole[3]), MaxTimeCriteria(600.0)])
    given = options(no_repeat_ngram_size=1, stopping_criteria=own)
    assert collect(decode_steps(llama, inputs(PROMPT), given))[0] == whole[:4]
    given = options(logits_processor=[Forbid(whole[0])])
    assert whole[0] not in collect(decode_steps(llama, inputs(PROMPT), given))[0]


def test_several_beams_are_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="num_beams=2 was given; only 1"):
        decode_steps(llama, inputs(PROMPT), options(num_beams=2))


def test_nothing_runs_that_is_not_asked_for(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, forward = 0, llama.forward

    def count(*arguments: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(llama, "forward", count)
    steps = decode_steps(llama, inputs(PROMPT), options())
    assert passes == 0
    next(steps), next(steps)
    assert passes == 2
    steps.close()  # type: ignore[attr-defined]
    assert passes == 2
    assert not torch.is_inference_mode_enabled()


# Log-probabilities


def test_logprobs_are_the_models_own_before_any_option(llama: Any) -> None:
    given = inputs(PROMPT)
    steps = list(decode_steps(llama, given, options(max_new_tokens=4, no_repeat_ngram_size=1), logprobs=3))
    ids = given["input_ids"]
    for step in steps:
        logprobs = llama(ids).logits[:, -1].log_softmax(dim=-1)
        assert step.logprobs is not None
        assert step.top_logprobs is not None
        assert step.top_tokens is not None
        assert step.logprobs.item() == pytest.approx(logprobs[0, step.tokens[0]].item(), abs=1e-5)
        torch.testing.assert_close(step.top_logprobs, logprobs.topk(3).values, atol=1e-5, rtol=0)
        assert torch.equal(step.top_tokens, logprobs.topk(3).indices)
        ids = torch.cat([ids, torch.tensor([step.tokens])], dim=1)


def test_logprobs_of_the_chosen_tokens_alone(llama: Any) -> None:
    step = next(decode_steps(llama, inputs(PROMPT), options(), logprobs=0))
    assert step.logprobs is not None
    assert step.top_logprobs is None
    assert next(decode_steps(llama, inputs(PROMPT), options())).logprobs is None


# Watchers


def test_a_watcher_sees_each_step_and_its_processed_scores(llama: Any) -> None:
    seen: list[tuple[list[int], float]] = []

    def watch(ids: Tensor, scores: Tensor) -> None:
        seen.append((ids[0].tolist(), scores[0, 61].item()))

    given = options(max_new_tokens=3, suppress_tokens=[61])
    answer = collect(decode_steps(llama, inputs(PROMPT), given, watch=watch))[0]
    assert [ids for ids, _ in seen] == [[*PROMPT, *answer[:n]] for n in range(3)]
    assert [score for _, score in seen] == [-torch.inf] * 3


def test_a_watcher_may_change_the_scores(llama: Any) -> None:
    def watch(ids: Tensor, scores: Tensor) -> Verdict | None:
        if ids.shape[1] != len(PROMPT) + 2:
            return None
        return Verdict(scores=torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([77]), 0.0))

    answer = collect(decode_steps(llama, inputs(PROMPT), options(), watch=watch))[0]
    assert answer[2] == 77
    assert answer[3:] == expect(llama, inputs([*PROMPT, *answer[:3]]), max_new_tokens=14)[0]


def test_a_watcher_may_end_a_row(llama: Any) -> None:
    def watch(ids: Tensor, scores: Tensor) -> Verdict:
        return Verdict(stop=torch.tensor([ids.shape[1] >= len(PROMPT) + 3, ids.shape[1] >= len(PROMPT) + 6]))

    given = inputs(PROMPT, [1, 9, 8, 7, 5])
    steps = list(decode_steps(llama, given, options(), watch=watch))
    first, second = expect(llama, given)
    assert collect(steps) == [first[:3], second[:6]]
    assert steps[-1] == Step([None, None], True)


@pytest.mark.parametrize("back", [1, 4, 6])
@pytest.mark.parametrize("rows", [1, 2])
def test_after_going_back_all_is_as_if_it_had_not_been(llama: Any, back: int, rows: int) -> None:
    went_back = False

    def watch(ids: Tensor, scores: Tensor) -> Verdict | None:
        nonlocal went_back
        if ids.shape[1] == longest + 6 and not went_back:
            went_back = True
            return Verdict(back=back)
        return None

    # the second row is padded, so that masks and positions have to go back as well
    given = inputs(PROMPT) if rows == 1 else inputs([*PROMPT, 4, 4], PROMPT)
    longest = given["input_ids"].shape[1]
    steps = list(decode_steps(llama, given, options(), watch=watch))
    expected = expect(llama, given)
    assert [step.back for step in steps if step.back] == [back]
    heard: list[list[int | None]] = []
    for step in steps:
        heard = heard[: -step.back] if step.back else [*heard, step.tokens]
    assert [list(row) for row in zip(*heard, strict=True)] == expected


def test_what_cannot_be_taken_back_is_said(llama: Any, random_model: Callable[..., Any]) -> None:
    def watch(ids: Tensor, scores: Tensor) -> Verdict | None:
        return Verdict(back=3) if ids.shape[1] == len(PROMPT) + 2 else None

    with pytest.raises(LoryError, match="3 tokens should be taken back from an answer of 2"):
        list(decode_steps(llama, inputs(PROMPT), options(), watch=watch))
    mamba = random_model("Mamba", **FAMILIES["Mamba"])

    def early(ids: Tensor, scores: Tensor) -> Verdict | None:
        return Verdict(back=1) if ids.shape[1] == len(PROMPT) + 2 else None

    with pytest.raises(LoryError, match="MambaForCausalLM cannot go back"):
        list(decode_steps(mamba, inputs(PROMPT), options(), watch=early))


# The cache


def test_a_growing_layer_holds_what_a_dynamic_one_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = GrowingLayer(), DynamicLayer()

    def add(tokens: int, rows: int = 2) -> None:
        keys, values = torch.randn(rows, 3, tokens, 5, generator=generator), torch.randn(rows, 3, tokens, 4)
        got, expected = (layer.update(keys, values) for layer in layers)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert layers[0].get_seq_length() == layers[1].get_seq_length()

    add(7), add(1), add(300), add(1), add(500)
    for change in (
        lambda layer: layer.crop(-17),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    ):
        [change(layer) for layer in layers]
        add(2), add(1)
    [layer.batch_repeat_interleave(2) for layer in layers]
    add(1, rows=4)
    layers[0].reset()
    layers = layers[0], DynamicLayer()
    add(3)


def test_a_token_is_written_without_copying_those_before() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
    place = layer.keys.data_ptr()
    for _ in range(100):
        layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert layer.keys.data_ptr() == place


def test_layers_that_forget_or_hold_something_stay_as_they_are(random_model: Callable[..., Any]) -> None:
    cache = DynamicCache(config=random_model("Gemma2", **FAMILIES["Gemma2"]).config)
    grow_in_place(cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "GrowingLayer"]
    filled = DynamicCache()
    filled.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    grow_in_place(filled)
    assert type(filled.layers[0]) is DynamicLayer
