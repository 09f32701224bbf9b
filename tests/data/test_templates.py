"""A prompt is what the template writes with its generation prompt, and an answer what it adds up to its terminator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lory.data.templates import render_prompt, render_text, render_turn, tokenize
from lory.runtime import UsageError
from lory.types import Message, Role

ChatTokenizer = Callable[[str], tuple[Any, tuple[int, ...]]]
QUESTION = Message("user", "What is the capital of France?")
ANSWER = Message("assistant", "Paris.")


def turns(*contents: str) -> list[Message]:
    roles: tuple[Role, Role] = ("user", "assistant")
    return [Message(roles[number % 2], content) for number, content in enumerate(contents)]


def test_a_prompt_is_the_text_of_transformers_own_rendering(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, _ = chat_tokenizer("smollm2")
    messages = [Message("system", "Be brief."), QUESTION]

    ids = render_prompt(tokenizer, messages)

    theirs = tokenizer.apply_chat_template(
        [message.to_dict() for message in messages], add_generation_prompt=True, return_dict=False
    )
    assert ids == theirs
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_are_written_by_the_template_alone(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, _ = chat_tokenizer("llama3")
    ids = render_prompt(tokenizer, [QUESTION])
    assert tokenizer.decode(ids).count("<|begin_of_text|>") == 1
    # marks are single tokens
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|start_header_id|>"])


@pytest.mark.parametrize("name", ["smollm2", "chatml", "llama3", "gemma", "qwen3", "thinks", "phi3", "bare"])
def test_a_turn_is_its_prompt_and_the_answer_with_one_terminator(name: str, chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer(name)
    messages = [*turns("Hi", "Hello!"), QUESTION, ANSWER]

    prompt, answer = render_turn(tokenizer, messages, terminators)

    assert prompt == render_prompt(tokenizer, messages[:-1])
    text = tokenizer.decode(answer[:-1])
    assert text == ("Paris.\n" if name == "bare" else "Paris.")
    assert answer[-1] in terminators
    assert not set(answer[:-1]) & set(terminators)


def test_the_answer_and_its_prompt_are_the_tokens_of_the_whole(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    whole = tokenize(tokenizer, render_text(tokenizer, [QUESTION, ANSWER], for_answer=False))
    prompt, answer = render_turn(tokenizer, [QUESTION, ANSWER], terminators)
    assert prompt + answer == whole[:-1]
    assert tokenizer.decode(whole[-1]) == "\n"


@pytest.mark.parametrize("answer", ["e", "im", "n", "assistant", "<b>", "<", "user", "\n<"])
def test_an_answer_that_looks_like_a_mark_is_found(answer: str, chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("thinks")
    prompt, ids = render_turn(tokenizer, [*turns("Hi", answer), QUESTION, Message("assistant", answer)], terminators)
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    assert tokenizer.decode(ids) == f"{answer}<|im_end|>"


def test_a_terminator_in_the_answers_text_is_not_its_end(chat_tokenizer: ChatTokenizer) -> None:
    for name in ("smollm2", "phi3", "thinks"):
        tokenizer, terminators = chat_tokenizer(name)
        end = tokenizer.decode(terminators[-1])
        _, ids = render_turn(tokenizer, turns("How does a turn end?", f"With {end}, mostly."), terminators)
        assert tokenizer.decode(ids) == f"With {end}, mostly.{end}", name
    tokenizer, terminators = chat_tokenizer("bare")
    _, ids = render_turn(tokenizer, turns("How does a turn end?", "With <|im_end|>, mostly."), terminators)
    assert tokenizer.decode(ids) == "With <|im_end|>, mostly.\n<|im_end|>"


def test_an_answer_after_a_token_that_would_span_the_border_is_tokenized_alone(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    prompt, ids = render_turn(tokenizer, turns("Hi", "\n\nHello"), terminators)
    whole = tokenize(tokenizer, render_text(tokenizer, turns("Hi", "\n\nHello"), for_answer=False))
    assert whole[: len(prompt)] != prompt
    assert prompt == render_prompt(tokenizer, turns("Hi"))
    assert tokenizer.decode(ids) == "\n\nHello<|im_end|>"


def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_before_an_answer() -> None:
    # as for Llama 2 and Mistral: tokenized alone, an answer would begin otherwise than in its place
    tokenizer = _metaspace_tokenizer()
    terminators = (tokenizer.eos_token_id,)
    messages = turns("hi", "hello")
    prompt, answer = render_turn(tokenizer, messages, terminators)
    assert tokenizer.convert_ids_to_tokens(tokenize(tokenizer, "hello"))[0] == "▁"
    assert tokenizer.convert_ids_to_tokens(answer) == ["h", "e", "l", "l", "o", "</s>"]
    assert prompt == render_prompt(tokenizer, messages[:-1])


def _metaspace_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = ["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz<|>\n"]
    vocabulary = {character: number for number, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return tokenizer


def test_a_template_that_refuses_is_reported_with_its_reason(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, _ = chat_tokenizer("gemma")
    with pytest.raises(UsageError) as caught:
        render_prompt(tokenizer, [Message("system", "Be brief."), QUESTION])
    assert str(caught.value) == "The model's chat template refuses a conversation of system, user: No system role."


def test_a_template_that_changes_an_answer_is_refused(chat_tokenizer: ChatTokenizer) -> None:
    original, terminators = chat_tokenizer("thinks")
    tokenizer = copy.deepcopy(original)
    tokenizer.chat_template = original.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(UsageError, match="changes the text of an answer"):
        render_turn(tokenizer, [QUESTION, ANSWER], terminators)


def test_a_tokenizer_without_a_template_is_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template"):
        render_prompt(tokenizer, [QUESTION])


def test_a_template_cannot_reach_python(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UsageError, match="refuses"):
        render_prompt(tokenizer, [QUESTION])
