"""Many prompts at a time: each answer is what it would be alone, in the order of the prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.vision_models import make_qwen2_vl

from lory.assistant import Assistant, Messages, load
from lory.batch import answer_batch, answer_prompts, gather, plan_batches
from lory.data.vision.reader import Prompt
from lory.generate import GenerationOptions, decode_text
from lory.runtime import LoryError, UsageError

OPTIONS = GenerationOptions(max_new_tokens=12)
QUESTIONS = ["Who are you?", "2", "What is the capital of France? " * 6, "seven times six", "你好", "2"]


@pytest.fixture(scope="module")
def assistant(tiny_model: Path) -> Assistant:
    return load(tiny_model, "float32")


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_answers_are_those_of_one_by_one(assistant: Assistant, batch_size: int) -> None:
    alone = [assistant.chat(question, OPTIONS) for question in QUESTIONS]
    assert assistant.chat_batch(QUESTIONS, OPTIONS, batch_size) == alone
    assert len(set(alone)) > 3


def test_conversations_may_be_mixed_with_questions_and_may_be_none(assistant: Assistant) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert assistant.chat_batch([talk, "Hi"], OPTIONS) == [assistant.chat(talk, OPTIONS), assistant.chat("Hi", OPTIONS)]
    assert assistant.chat_batch([], OPTIONS) == []


def test_a_long_neighbour_takes_no_room_from_a_short_one(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant.model.config, "max_position_embeddings", 60)
    options = GenerationOptions(max_new_tokens=40)
    prompts = [[5] * 50, [5] * 6, [5] * 8]
    assert plan_batches(assistant.model, prompts, options, 8) == [[0], [1, 2]]
    found = list(answer_prompts(assistant.model, assistant.tokenizer, prompts, options, [0]))
    assert [len(answer.ids) for answer in found if answer.reason == "length"] == [10, 40, 40]
    with pytest.raises(UsageError, match="The prompt has 60 tokens"):
        list(answer_prompts(assistant.model, assistant.tokenizer, [[5] * 60], options, [0]))


def test_images_of_other_shapes_are_apart(assistant: Assistant) -> None:
    def seen(*shape: int) -> Prompt:
        return Prompt([5, 6], {"pixel_values": torch.zeros(shape), "mm_token_type_ids": torch.zeros(1, shape[0])})

    prompts = [seen(4, 12), seen(1, 3, 8, 8), [5, 6], seen(9, 12)]
    assert plan_batches(assistant.model, prompts, OPTIONS, 8) == [[0, 3], [1], [2]]


def test_batches_are_of_about_the_same_length(assistant: Assistant) -> None:
    prompts = [[5] * length for length in (9, 2, 8, 1)]
    assert plan_batches(assistant.model, prompts, OPTIONS, 2) == [[3, 1], [2, 0]]
    with pytest.raises(UsageError, match="batch_size = 0"):
        assistant.chat_batch(["Hi"], OPTIONS, 0)


def test_few_large_images_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lory.batch._PIXELS", 100)
    made: list[int] = []

    def make(number: int) -> Prompt | None:
        made.append(number)
        return Prompt([5], {"pixel_values": torch.zeros(10)}) if number != 4 else None

    windows = gather(range(10), make, 2)
    assert [number for number, _ in next(windows)] == [0, 1, 2]
    assert made == [0, 1, 2]
    assert [[number for number, _ in window] for window in windows] == [[3, 5, 6], [7, 8, 9]]


def test_more_than_a_window_stays_in_order(assistant: Assistant) -> None:
    options = GenerationOptions(max_new_tokens=2)
    prompts = [[5 + number % 7] * (1 + number % 3) for number in range(20)]
    found = [answer.ids for answer in answer_prompts(assistant.model, assistant.tokenizer, prompts, options, [0], 1)]
    (one,) = answer_batch(assistant.model, assistant.tokenizer, [prompts[17]], options, [0]) or ()
    assert len(found) == 20
    assert found[17] == one.ids


def test_equal_prompts_draw_differently_and_repeatably(assistant: Assistant) -> None:
    options = GenerationOptions(max_new_tokens=6, do_sample=True, seed=3)
    one, other = (assistant.chat_batch(["Hi"] * 6, options, 2) for _ in range(2))
    assert one == other
    assert len(set(one)) > 3


@pytest.mark.parametrize("policy", ["report", "stop", "penalize", "back_up", "retry"])
def test_the_guard_watches_every_answer(assistant: Assistant, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerationOptions(max_new_tokens=80, on_loop=policy)
    # each token is as good as a word
    monkeypatch.setattr("lory.decoding.words.Words", lambda tokenizer: None)
    # a model that says the same token for ever
    head = assistant.model.lm_head.weight
    before = head.detach().clone()
    try:
        with torch.no_grad():
            head.zero_()
        prompts = [[5, 6, 7], [8, 9]]
        found = list(answer_prompts(assistant.model, assistant.tokenizer, prompts, options, [1]))
        alone = [answer_batch(assistant.model, assistant.tokenizer, [prompt], options, [1]) for prompt in prompts]
    finally:
        with torch.no_grad():
            head.copy_(before)
    assert found == [answers[0] for answers in alone if answers]
    assert all(answer.loops for answer in found)
    reasons = {"report": "length", "stop": "repetition", "retry": "retry"}
    if policy in reasons:
        assert {answer.reason for answer in found} == {reasons[policy]}


@pytest.mark.parametrize("policy", ["stop", "penalize", "back_up", "retry"])
def test_the_guard_watches_a_chat_as_it_does_a_stream(
    tiny_model: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerationOptions(max_new_tokens=80, on_loop=policy)
    monkeypatch.setattr("lory.decoding.words.Words", lambda tokenizer: None)
    # the next token depends on the last one alone, so it goes round in circles
    circling = load(tiny_model, "float32")
    with torch.no_grad():
        for weight in circling.model.model.layers.parameters():
            weight.zero_()
    answer = circling.chat("Hi", options)
    unwatched = options.model_copy(update={"on_loop": "off"})
    assert answer == "".join(circling.stream("Hi", options)) != circling.chat("Hi", unwatched)
    assert decode_text(circling.tokenizer, circling.answer_ids("Hi", options)) == answer
    if policy == "stop":
        assert circling.generate("Hi", options) != circling.generate("Hi", unwatched)


def test_retry_asks_again_as_a_stream_does(assistant: Assistant) -> None:
    options = GenerationOptions(max_new_tokens=20, on_loop="retry")
    assert assistant.chat_batch(["Hi"], options) == ["".join(assistant.stream("Hi", options))]


def test_it_stops_when_asked_and_says_what_failed(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (assistant.model, assistant.tokenizer, [[5, 6]], OPTIONS, [0])
    assert answer_batch(*arguments, stopped=lambda: True) is None
    (answer,) = answer_batch(*arguments) or ()
    assert decode_text(assistant.tokenizer, answer.ids)

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory.\nTrace")

    monkeypatch.setattr("lory.batch.stream_steps", fail)
    with pytest.raises(LoryError, match=r"can't allocate memory; fewer prompts at a time .* take less memory\.$"):
        answer_batch(*arguments)


def test_prompts_with_images_are_answered_as_alone(tmp_path: Path) -> None:
    make_qwen2_vl(tmp_path)
    assistant = load(tmp_path)
    images = [Image.new("RGB", size, colour) for size, colour in (((40, 16), "red"), ((16, 24), "blue"))]
    questions: list[Messages] = ["Hi"]
    for image in images:
        questions.append(
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
        )
    alone = [assistant.chat(question, OPTIONS) for question in questions]
    assert assistant.chat_batch(questions, OPTIONS) == alone
    assert len(set(alone)) == 3
