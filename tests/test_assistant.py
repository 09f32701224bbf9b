"""`lory.load(MODEL)`: greedy answers are transformers' own, on the tiny model and on the real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lory
from lory.assistant import Assistant, load, parse_messages
from lory.data.encoding.encode import Encoder
from lory.generate import GenerationOptions
from lory.runtime import UsageError
from lory.types import Conversation, Message

CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]


def answer_with_transformers(model: Any, folder: Path, messages: list[dict[str, str]], tokens: int) -> str:
    """The answer of plain transformers, from template to text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def load_plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Assistant:
    return load(tiny_model, device="cpu")


def test_a_greedy_answer_is_that_of_transformers(tiny: Assistant, tiny_model: Path) -> None:
    expected = answer_with_transformers(load_plain(tiny_model), tiny_model, CHAT, 37)
    assert tiny.chat(CHAT, GenerationOptions(max_new_tokens=37)) == expected != ""


def test_an_answer_with_an_adapter_is_that_of_peft(tiny: Assistant, tiny_adapter: Path, tiny_model: Path) -> None:
    options = GenerationOptions(max_new_tokens=37)
    model = PeftModel.from_pretrained(load_plain(tiny_model), tiny_adapter)
    answer = load(tiny_adapter, device="cpu").chat(CHAT, options)
    assert answer == answer_with_transformers(model, tiny_model, CHAT, 37)
    assert answer != tiny.chat(CHAT, options)


def test_smollm2_answers_and_streams_as_under_transformers(smollm2: Path) -> None:
    assistant, options = load("smollm2", device="cpu"), GenerationOptions(max_new_tokens=24)
    story = [{"role": "user", "content": "Tell me a story about a parrot, in two lines."}]
    expected = answer_with_transformers(load_plain(smollm2), smollm2, story, 24)
    assert assistant.chat(story, options) == expected
    pieces = list(assistant.stream(story, options))
    assert "".join(pieces) == expected
    assert len(pieces) == len(assistant.answer_ids(story, options)) > 5


def test_a_stream_joined_is_the_chat(tiny: Assistant) -> None:
    for options in (GenerationOptions(max_new_tokens=60), GenerationOptions(max_new_tokens=60, do_sample=True, seed=4)):
        assert "".join(tiny.stream(CHAT, options)) == tiny.chat(CHAT, options)


def test_a_stream_can_be_closed(tiny: Assistant) -> None:
    stream = cast("Generator[str, None, None]", tiny.stream(CHAT, GenerationOptions(max_new_tokens=400)))
    next(stream)
    stream.close()
    assert list(stream) == []


def test_answer_ids_are_the_chat_without_its_end(tiny: Assistant) -> None:
    ids = tiny.answer_ids(CHAT, GenerationOptions(max_new_tokens=20, do_sample=True, seed=1))
    assert ids
    assert not set(ids) & set(tiny.terminators)


def test_a_question_alone_is_a_user_message(tiny: Assistant) -> None:
    assert tiny.prompt_ids("Hi") == tiny.prompt_ids([{"role": "user", "content": "Hi"}])


def test_the_prompt_is_the_one_that_was_trained_on(tiny: Assistant) -> None:
    messages = (*(Message(**message) for message in CHAT), Message("assistant", "Rome."))
    encoder = Encoder(tiny.tokenizer, tiny.terminators, 512, loss_on="last")
    (sample,) = encoder.encode(Conversation(messages)).samples
    prompt = tiny.prompt_ids(CHAT)
    assert list(sample.input_ids[: len(prompt)]) == prompt
    assert sample.labels[len(prompt)] == sample.input_ids[len(prompt)]
    assert set(sample.labels[: len(prompt)]) == {-100}


def test_plain_text_is_continued_without_a_template(tiny: Assistant, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer("Two and", return_tensors="pt")
    output = load_plain(tiny_model).generate(**prompt, max_new_tokens=19, do_sample=False)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert tiny.generate("Two and", GenerationOptions(max_new_tokens=19)) == expected


def test_nothing_cannot_be_continued(tiny: Assistant) -> None:
    with pytest.raises(UsageError, match="An empty text was given"):
        tiny.generate("")


def test_the_models_own_options_are_the_default(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 3, "repetition_penalty": 1.5}))
    assistant = load(folder, device="cpu")
    assert assistant.options == GenerationOptions(max_new_tokens=3, repetition_penalty=1.5)
    assert assistant.chat("Hi") == assistant.chat("Hi", GenerationOptions(max_new_tokens=3, repetition_penalty=1.5))
    assert len(assistant.answer_ids("Hi")) <= 3


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "No messages were given"),
        ([{"role": "bird", "content": "squawk"}], "'bird'.*user"),
        ([{"role": "user"}], "a message is"),
        ([{"role": "user", "content": None}], "a message is"),
        ([{"content": "hi"}], "a message is"),
    ],
)
def test_a_broken_message_is_refused(messages: list[dict[str, str]], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_messages(messages)


@pytest.mark.parametrize("device", ["bad", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(tiny_model: Path, device: str) -> None:
    if not device:  # no device is the default one
        assert load(tiny_model, device=device).model.device.type in ("cpu", "cuda")
        return
    with pytest.raises(UsageError, match=f"The device '{device}' cannot be used here"):
        load(tiny_model, device=device)


def test_a_dtype_is_that_of_the_base_weights(tiny_model: Path) -> None:
    assert load(tiny_model, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_lory_load_is_the_way_in(tiny_model: Path) -> None:
    assert lory.load is load
    assert lory.load(str(tiny_model)).name == str(tiny_model)
    with pytest.raises(AttributeError, match="has no attribute 'parrot'"):
        _ = lory.parrot
