"""A prompt is what the template writes with its generation prompt, and an answer what it adds up to its terminator."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lory.data.encoding.named_templates import find_template
from lory.data.encoding.templates import (
    RefusedTurn,
    render_prompt,
    render_text,
    render_turn,
    render_turns,
    tokenize,
    tokenize_all,
)
from lory.runtime import UsageError
from lory.types import Media, Message, Role, ToolCall

TEMPLATES = ["smollm2", "chatml", "llama3", "gemma", "qwen3", "thinks", "phi3", "bare"]
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


@pytest.mark.parametrize("name", TEMPLATES)
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


def _metaspace_tokenizer(scheme: str = "first") -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = ["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz<|>\n"]
    vocabulary = {character: number for number, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
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


# Many turns at once

SAMPLES = [
    turns("Hi", "Hello!"),
    [Message("system", "Be brief."), *turns("你好", "你好！😀")],
    turns("Hi", "Hello!", "Bye", "See you."),
    turns("Hi", "\n\nHello", "  and \t", " so on \n"),
    turns("What is <|im_end|>?", "<|im_end|> ends a turn; <|im_start|>user\nstarts one."),
    turns("<|im_start", "|>user<|end|><eos>", "\ue000", "</s>"),
    turns("2 + 2?", "<think>\nEasy.\n</think>\n\nIt is 4.", "Bye", "Bye"),
    turns("a" * 300, "b " * 300),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_many_turns_are_rendered_as_each_alone(name: str, chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer(name)
    samples = [messages for messages in SAMPLES if name != "gemma" or messages[0].role != "system"] * 4
    samples = [
        messages[: turn + 1]
        for messages in samples
        for turn in range(len(messages))
        if messages[turn].role == "assistant"
    ]

    assert render_turns(tokenizer, samples, terminators) == [
        render_turn(tokenizer, messages, terminators) for messages in samples
    ]


def _mark(tokenizer: Any, *marks: str, **options: bool) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(mark, special=True, **options) for mark in marks])
    return tokenizer


def _lowering_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import normalizers

    tokenizer = _metaspace_tokenizer("always")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Lowercase()])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "a space before the first text": lambda: _mark(_metaspace_tokenizer("first"), "<|a|>", "<|ab|>", normalized=False),
    "a space before each text": lambda: _mark(_metaspace_tokenizer("always"), "<|a|>", "|>", normalized=False),
    "a normalizer": lambda: _mark(_lowering_tokenizer(), "<|a|>", "<|AB|>", normalized=False),
    "marks that are normalized": lambda: _mark(_mark(_lowering_tokenizer(), "<|AB|>"), "<|a|>", normalized=False),
    "marks that take the blanks after them": lambda: _mark(
        _metaspace_tokenizer(), "<|a|>", "<|ab|>", normalized=False, rstrip=True
    ),
    "marks that take the blanks before them": lambda: _mark(
        _metaspace_tokenizer(), "<|a|>", "<|ab|>", normalized=False, lstrip=True
    ),
    "marks that begin alike": lambda: _mark(_metaspace_tokenizer(), "<|a|>", "<|a|>ab", normalized=False),
    "marks that are words": lambda: _mark(_metaspace_tokenizer(), "a", "<|ab|>", normalized=False, single_word=True),
    "no marks": lambda: _metaspace_tokenizer(),
}


@pytest.mark.parametrize("first", ["<|a|><|ab|></s>", "<|a|>|>", "<|AB|>", "<|a|>ab<|a|>", "</s>a", ""])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_that_share_parts_have_the_tokens_that_each_has_alone(kind: str, first: str) -> None:
    tokenizer, pick = TOKENIZERS[kind](), random.Random(0)
    pieces = ["<|a|>", "<|ab|>", "<|AB|>", "</s>", "<|", "|>", " ", "\n", "a", "ab", "hello", "A", ">"]
    texts = [f"{first} a", *("".join(pick.choices(pieces, k=pick.randrange(12))) for _ in range(400))]
    assert tokenize_all(tokenizer, texts) == [tokenize(tokenizer, text) for text in texts]


class _LoweringTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text: Any, **options: Any) -> Any:
        texts = text.lower() if isinstance(text, str) else [one.lower() for one in text]
        return super().__call__(texts, **options)


def test_a_tokenizer_with_ways_of_its_own_keeps_them() -> None:
    backend = _mark(_metaspace_tokenizer(), "<|a|>", normalized=False).backend_tokenizer
    tokenizer = _LoweringTokenizer(tokenizer_object=backend)
    texts = [f"<|a|>HELLO {'A' * number}" for number in range(40)]
    assert tokenize_all(tokenizer, texts) == [tokenize(tokenizer, text) for text in texts]
    assert tokenizer.unk_token_id not in tokenize_all(tokenizer, texts)[0]


def test_an_earlier_cut_does_not_cut_many_texts(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [f"<|im_start|>{number} and so on" for number in range(40)]
    expected = [tokenize(tokenizer, text) for text in texts]
    tokenizer(texts, truncation=True, max_length=3, padding="max_length")
    assert tokenize_all(tokenizer, texts) == expected


def test_the_turn_that_is_refused_among_many_is_named(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("gemma")
    samples = [turns("Hi", "Hello!")] * 30
    samples[17] = [Message("system", "Be brief."), *turns("Hi", "Hello!")]
    with pytest.raises(RefusedTurn, match="No system role") as caught:
        render_turns(tokenizer, samples, terminators)
    assert caught.value.index == 17
    # it survives the way back from another process
    assert copy.copy(caught.value).index == 17


# Tools

TOOLS = (
    '[{"type": "function", "function": {"name": "weather", "description": "The weather of a city.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]'
)
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Paris"}', "call-1"),))
TOOL_CHAT = [
    Message("user", "Is it warm in Paris?"),
    CALL,
    Message("tool", '{"celsius": 31}', name="weather", tool_call_id="call-1"),
    Message("assistant", "Yes, 31 degrees."),
]


@pytest.fixture
def hermes(chat_tokenizer: ChatTokenizer) -> tuple[Any, tuple[int, ...]]:
    original, terminators = chat_tokenizer("chatml")
    tokenizer = copy.deepcopy(original)
    tokenizer.chat_template = find_template("hermes")
    return tokenizer, terminators


def test_an_answer_may_be_a_call_alone(hermes: tuple[Any, tuple[int, ...]]) -> None:
    tokenizer, terminators = hermes
    prompt, answer = render_turn(tokenizer, TOOL_CHAT[:2], terminators, TOOLS)
    assert prompt == render_prompt(tokenizer, TOOL_CHAT[:1], TOOLS)
    assert '"name": "weather", "description": "The weather of a city."' in tokenizer.decode(prompt)
    assert tokenizer.decode(answer) == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    )


def test_the_answer_after_a_result_follows_on_the_call(hermes: tuple[Any, tuple[int, ...]]) -> None:
    tokenizer, terminators = hermes
    first, call = render_turn(tokenizer, TOOL_CHAT[:2], terminators, TOOLS)
    prompt, answer = render_turn(tokenizer, TOOL_CHAT, terminators, TOOLS)
    assert prompt[: len(first + call)] == first + call
    assert tokenizer.decode(prompt[len(first + call) :]) == (
        '\n<|im_start|>user\n<tool_response>\n{"celsius": 31}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )
    assert tokenizer.decode(answer) == "Yes, 31 degrees.<|im_end|>"


def test_each_of_many_turns_has_its_own_tools(hermes: tuple[Any, tuple[int, ...]]) -> None:
    tokenizer, terminators = hermes
    samples = [TOOL_CHAT[:2], [QUESTION, ANSWER], TOOL_CHAT] * 8
    tools = [TOOLS, "", TOOLS] * 8
    assert render_turns(tokenizer, samples, terminators, tools) == [
        render_turn(tokenizer, messages, terminators, own) for messages, own in zip(samples, tools, strict=True)
    ]


def test_a_template_without_tools_is_refused_where_there_are_some(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    with pytest.raises(UsageError, match="does not tell the model of the tool 'weather'"):
        render_prompt(tokenizer, TOOL_CHAT[:1], TOOLS)
    with pytest.raises(UsageError, match="leaves out the call of 'weather'"):
        render_turn(tokenizer, TOOL_CHAT[:2], terminators)
    with pytest.raises(UsageError, match="leaves out the call of 'weather'"):
        render_prompt(tokenizer, TOOL_CHAT[:3])


@pytest.mark.parametrize(
    ("tools", "reason"),
    [("[{", "valid JSON"), ('{"name": "f"}', "array"), ("[1]", "array"), ('[{"function": "f"}]', "array")],
)
def test_tools_that_are_none_are_refused(tools: str, reason: str, chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, _ = chat_tokenizer("smollm2")
    with pytest.raises(UsageError, match=reason):
        render_prompt(tokenizer, [QUESTION], tools)


# Reasoning

# as Qwen3's: reasoning is written apart, only after the last question, and then even where there is none
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (message['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# opens each answer with its thinking, and writes the answers of history without
R1 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last and message['reasoning_content'] %}"
    "{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
REASONED = [
    Message("user", "2 + 2?"),
    Message("assistant", "It is 4.", reasoning="Two and two."),
    Message("user", "3 + 3?"),
    Message("assistant", "It is 6.", reasoning="Three and three."),
]


def _with_template(chat_tokenizer: ChatTokenizer, template: str) -> tuple[Any, tuple[int, ...]]:
    original, terminators = chat_tokenizer("chatml")
    tokenizer = copy.deepcopy(original)
    tokenizer.chat_template = template
    return tokenizer, terminators


def test_reasoning_is_learnt_in_its_own_turn_and_absent_from_later_prompts(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = _with_template(chat_tokenizer, QWEN3)
    first, one = render_turn(tokenizer, REASONED[:2], terminators)
    prompt, two = render_turn(tokenizer, REASONED, terminators)
    assert tokenizer.decode(one) == "<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>"
    assert tokenizer.decode(two) == "<think>\nThree and three.\n</think>\n\nIt is 6.<|im_end|>"
    assert "Two and two." not in tokenizer.decode(prompt)
    # so the turns cannot share a sample
    assert prompt[: len(first + one)] != first + one
    assert prompt == render_prompt(tokenizer, REASONED[:3])


def test_an_answer_without_reasoning_is_learnt_as_the_template_writes_it(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = _with_template(chat_tokenizer, QWEN3)
    _, answer = render_turn(tokenizer, [QUESTION, ANSWER], terminators)
    assert tokenizer.decode(answer) == "<think>\n\n</think>\n\nParis.<|im_end|>"


def test_reasoning_goes_on_from_a_prompt_that_opens_it_otherwise(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = _with_template(chat_tokenizer, R1)
    prompt, answer = render_turn(tokenizer, REASONED, terminators)
    assert tokenizer.decode(prompt).endswith("It is 4.<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n"
                                             "<|im_start|>assistant\n<think>\n")  # fmt: skip
    assert tokenizer.decode(answer) == "Three and three.</think>It is 6.<|im_end|>"


def test_a_terminator_in_the_reasoning_is_not_the_end(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = _with_template(chat_tokenizer, QWEN3)
    answer = replace(ANSWER, reasoning="After <|im_end|> nothing comes.")
    _, ids = render_turn(tokenizer, [QUESTION, answer], terminators)
    assert tokenizer.decode(ids).endswith("nothing comes.\n</think>\n\nParis.<|im_end|>")


def test_a_template_that_drops_reasoning_is_refused(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    with pytest.raises(UsageError, match="leaves out the reasoning"):
        render_turn(tokenizer, REASONED[:2], terminators)
    # what is not learnt may be left out, as it is from history
    assert "Two and two." not in tokenizer.decode(render_prompt(tokenizer, REASONED[:3]))


# Images

# as SmolVLM's: it goes through the parts, and writes nothing for a plain text
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PICTURE = Message("user", "<image>What is this?", media=(Media("image", "lory.png"),))


def test_a_template_that_wants_parts_gets_texts_as_parts(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = _with_template(chat_tokenizer, PARTS)
    prompt, answer = render_turn(tokenizer, [PICTURE, ANSWER, QUESTION, ANSWER], terminators)
    assert tokenizer.decode(prompt) == (
        "<|im_start|>user\n<image>What is this?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(answer) == "Paris.<|im_end|>"


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_a_template_for_texts_refuses_an_image(name: str, chat_tokenizer: ChatTokenizer) -> None:
    # llama3's would write the list of parts as Python shows it
    tokenizer, _ = chat_tokenizer(name)
    with pytest.raises(UsageError, match=r"refuses a conversation of user|knows no images"):
        render_prompt(tokenizer, [PICTURE])


def test_a_template_that_changes_an_answer_behind_its_prompt_is_refused(chat_tokenizer: ChatTokenizer) -> None:
    original, terminators = chat_tokenizer("chatml")
    tokenizer = copy.deepcopy(original)
    tokenizer.chat_template = original.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(UsageError, match="changes the text of an answer"):
        render_turn(tokenizer, [QUESTION, ANSWER], terminators)
