"""What is done about a loop: reported, stopped, penalized, led out of; in lory's decode loop and in `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteriaList

from lory.decoding.loop import decode_steps
from lory.decoding.policy import Policy, PolicyGuard, RepetitionStop
from lory.runtime import UsageError


def decode(guard: PolicyGuard, cycle: int, tokens: int) -> list[int]:
    """A decode loop whose model counts to `cycle` over and over; gives the answer."""
    ids = [97, 98, 99]
    while len(ids) < 3 + tokens:
        scores = torch.ones(1, 100)
        scores[0, (ids[-1] + 1) % cycle if len(ids) > 3 else 0] = 5.0
        verdict = guard(torch.tensor([ids]), scores)
        if verdict and verdict.back:
            del ids[-verdict.back :]
            continue
        if verdict and verdict.stop is not None and verdict.stop[0]:
            break
        ids.append(int((scores if verdict is None or verdict.scores is None else verdict.scores).argmax()))
    return ids[3:]


def test_to_report_changes_nothing() -> None:
    guard = PolicyGuard("report", prompt_tokens=3)
    assert decode(guard, 10, 100) == list(range(10)) * 10
    assert (guard.loops[0][0].start, guard.loops[0][0].period) == (0, 10)
    assert guard.outcomes == {}


@pytest.mark.parametrize(("policy", "outcome"), [("stop", "repetition"), ("retry", "retry")])
def test_to_stop_or_retry_ends_the_answer(policy: Policy, outcome: str) -> None:
    guard = PolicyGuard(policy, prompt_tokens=3)
    assert len(decode(guard, 10, 100)) == 3 * 10 - 2
    assert guard.outcomes == {0: outcome}


def test_to_penalize_makes_the_loop_less_likely_until_it_is_left() -> None:
    guard = PolicyGuard("penalize", prompt_tokens=3, limit=20)
    answer = decode(guard, 10, 900)
    assert set(answer[:60]) == set(range(10))
    assert not set(answer[-10:]) <= set(range(10))


def test_to_back_up_keeps_one_copy_and_goes_on_otherwise() -> None:
    guard = PolicyGuard("back_up", prompt_tokens=3, seed=1, limit=50)
    answer = decode(guard, 10, 60)
    assert answer[:10] == list(range(10))
    assert answer[10] != 0
    assert len(answer) == 60
    assert answer == decode(PolicyGuard("back_up", prompt_tokens=3, seed=1, limit=50), 10, 60)


def test_only_one_answer_at_a_time_goes_back() -> None:
    with pytest.raises(UsageError, match="for 2 answers at a time"):
        PolicyGuard("back_up", prompt_tokens=1)(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 5))


def test_help_that_does_not_help_ends_in_a_stop() -> None:
    guard = PolicyGuard("penalize", prompt_tokens=0, limit=2)
    ids, scores = torch.arange(1000)[None] % 10, torch.zeros(1, 100)
    stopped = next(
        end for end in range(1, 1000) if (v := guard(ids[:, :end], scores)) and v.stop is not None and v.stop[0]
    )
    assert len(guard.loops[0]) == 3
    assert stopped < 120
    assert guard.outcomes == {0: "repetition"}


def test_rows_are_guarded_apart_and_padding_is_no_loop() -> None:
    guard = PolicyGuard("stop", prompt_tokens=0, terminators=[50])
    ids = torch.stack([torch.arange(90), torch.arange(90) % 10, torch.tensor([1, 2, 50] + [50] * 87)])
    for end in range(1, 91):
        guard(ids[:, :end], torch.zeros(3, 100))
    assert guard.outcomes == {1: "repetition"}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """A model without attention: each token decides the next, so that greedy decoding must go round in circles."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


def test_the_decode_loop_takes_a_guard_as_its_watcher(model: Any) -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    answers: dict[str, list[int | None]] = {}
    for policy in ("stop", "back_up"):
        guard = PolicyGuard(policy, 3, limit=50)
        answer: list[int | None] = []
        arguments = {"max_new_tokens": 120, "do_sample": False, "eos_token_id": None}
        for step in decode_steps(model, prompt, arguments, watch=guard):
            answer = answer[: len(answer) - step.back] if step.back else answer + step.tokens
        answers[policy] = [token for token in answer if token is not None]
    looped, led_out = answers["stop"], answers["back_up"]
    copy_end = guard.loops[0][0].start + guard.loops[0][0].period
    assert copy_end < len(looped) < 120
    assert len(led_out) == 120
    assert led_out[:copy_end] == looped[:copy_end]
    assert led_out[copy_end] != looped[copy_end]


def test_generate_stops_where_it_loops(model: Any) -> None:
    stop = RepetitionStop(prompt_tokens=3)
    prompt = torch.tensor([[5, 6, 7]])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=120,
        do_sample=False,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    assert output.shape[1] < 123
    loop = stop.loops[0]
    answer = output[0, 3:].tolist()
    assert answer[loop.start : loop.start + loop.period] == answer[loop.start + loop.period :][: loop.period]


def test_the_stopping_criterion_ends_only_the_row_that_loops() -> None:
    stop = RepetitionStop(prompt_tokens=3)
    ids = torch.stack([torch.arange(63), torch.arange(63) % 10])
    done = [stop(ids[:, :length], None).tolist() for length in range(4, 64)]
    assert done[0] == [False, False]
    assert done[-1] == [False, True]
    assert stop.loops[1].period == 10
    assert stop.loops[1].start == 0
