"""Each bundled template writes what its model's card shows; an answer ends with a token that generation stops at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lory.data.encoding.encode import Encoder
from lory.data.encoding.named_templates import (
    add_answer_end,
    answer_end,
    choose_template,
    find_template,
    guess_template,
    list_templates,
    set_template,
)
from lory.data.encoding.templates import render_prompt, render_text, render_turn
from lory.runtime import UsageError
from lory.types import Conversation, Message

ChatTokenizer = Callable[[str], tuple[Any, tuple[int, ...]]]

SYSTEM = [Message("system", "Be brief."), Message("user", "Hi")]
TWO_TURNS = [
    Message("user", "Hi"),
    Message("assistant", "Hello!"),
    Message("user", "Bye"),
    Message("assistant", "Bye!"),
]
QUESTION = [Message("user", "Hi")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# name: beginning and end of a sequence; the texts of SYSTEM, TWO_TURNS and QUESTION; what ends an answer
CARDS: dict[str, tuple[tuple[str, str], tuple[str, str, str], str]] = {
    "chatml": (
        ("", "<|endoftext|>"),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        "<|im_end|>",
    ),
    "hermes": (
        ("", "<|endoftext|>"),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        "<|im_end|>",
    ),
    "internlm2": (
        ("<s>", "</s>"),
        (
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n",
            "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        "<|im_end|>",
    ),
    "llama2": (
        ("<s>", "</s>"),
        (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
            "<s>[INST] Hi [/INST] Hello! </s><s>[INST] Bye [/INST] Bye! </s>",
            "<s>[INST] Hi [/INST]",
        ),
        "</s>",
    ),
    "llama3": (
        ("<|begin_of_text|>", "<|end_of_text|>"),
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nBye!<|eot_id|>",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "<|eot_id|>",
    ),
    "mistral": (
        ("<s>", "</s>"),
        (
            "<s>[INST] Be brief.\n\nHi [/INST]",
            "<s>[INST] Hi [/INST]Hello!</s> [INST] Bye [/INST]Bye!</s> ",
            "<s>[INST] Hi [/INST]",
        ),
        "</s>",
    ),
    "gemma": (
        ("<bos>", "<eos>"),
        (
            "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nBye!<end_of_turn>\n",
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        ),
        "<end_of_turn>",
    ),
    "phi3": (
        ("<s>", "<|endoftext|>"),
        (
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
            "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\nBye!<|end|>\n",
            "<|user|>\nHi<|end|>\n<|assistant|>\n",
        ),
        "<|end|>",
    ),
    "chatglm3": (
        ("", "</s>"),
        (
            "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>",
            "[gMASK]sop<|user|>\n Hi<|assistant|>\n Hello!<|user|>\n Bye<|assistant|>\n Bye!",
            "[gMASK]sop<|user|>\n Hi<|assistant|>",
        ),
        "</s>",
    ),
    "glm4": (
        ("", "<|endoftext|>"),
        (
            "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>",
            "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello!<|user|>\nBye<|assistant|>\nBye!",
            "[gMASK]<sop><|user|>\nHi<|assistant|>",
        ),
        "<|endoftext|>",
    ),
    "baichuan2": (
        ("<s>", "</s>"),
        (
            "Be brief.<reserved_106>Hi<reserved_107>",
            "<reserved_106>Hi<reserved_107>Hello!<reserved_106>Bye<reserved_107>Bye!",
            "<reserved_106>Hi<reserved_107>",
        ),
        "</s>",
    ),
    "deepseek": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        (
            "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hi\n\nAssistant:",
            "<｜begin▁of▁sentence｜>User: Hi\n\nAssistant: Hello!<｜end▁of▁sentence｜>"
            "User: Bye\n\nAssistant: Bye!<｜end▁of▁sentence｜>",
            "<｜begin▁of▁sentence｜>User: Hi\n\nAssistant:",
        ),
        "<｜end▁of▁sentence｜>",
    ),
    "vicuna": (
        ("<s>", "</s>"),
        (
            "<s>Be brief. USER: Hi ASSISTANT:",
            f"<s>{VICUNA} USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT: Bye!</s>",
            f"<s>{VICUNA} USER: Hi ASSISTANT:",
        ),
        "</s>",
    ),
    "alpaca": (
        ("<s>", "</s>"),
        (
            "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n",
            f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n"
            "### Instruction:\nBye\n\n### Response:\nBye!</s>\n\n",
            f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\n",
        ),
        "</s>",
    ),
    "zephyr": (
        ("<s>", "</s>"),
        (
            "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
            "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n<|assistant|>\nBye!</s>\n",
            "<|user|>\nHi</s>\n<|assistant|>\n",
        ),
        "</s>",
    ),
}


def make_tokenizer(bos: str, eos: str, *marks: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with these special tokens, and no template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


@pytest.fixture(params=CARDS)
def card(request: pytest.FixtureRequest) -> tuple[str, Any, tuple[str, str, str], str]:
    """A bundled template's name, a tokenizer that has it, and what its card says."""
    (bos, eos), texts, end = CARDS[request.param]
    tokenizer = make_tokenizer(bos, eos, end)
    set_template(tokenizer, find_template(request.param))
    return request.param, tokenizer, texts, end


def test_every_bundled_template_is_tested_here() -> None:
    assert sorted(CARDS) == list(list_templates())


def test_it_writes_what_the_card_shows(card: tuple[str, Any, tuple[str, str, str], str]) -> None:
    _, tokenizer, (system, two_turns, question), _ = card
    assert render_text(tokenizer, SYSTEM, for_answer=True) == system
    assert render_text(tokenizer, TWO_TURNS, for_answer=False) == two_turns
    assert render_text(tokenizer, QUESTION, for_answer=True) == question


def test_its_note_names_the_end(card: tuple[str, Any, tuple[str, str, str], str]) -> None:
    name, tokenizer, _, end = card
    assert tokenizer.eos_token == end
    note = list_templates()[name]
    assert note.endswith((f"{end}.", f"{end}, the tokenizer's end of sequence.", "the tokenizer's end of sequence."))


def test_each_answer_is_learnt_up_to_its_end(card: tuple[str, Any, tuple[str, str, str], str]) -> None:
    _, tokenizer, _, end = card
    terminators = (tokenizer.eos_token_id,)
    for turn, text in ((1, "Hello!"), (3, "Bye!")):
        prompt, answer = render_turn(tokenizer, TWO_TURNS[: turn + 1], terminators)
        assert prompt == render_prompt(tokenizer, TWO_TURNS[:turn])
        assert tokenizer.decode(answer[:-1]).strip() == text
        assert tokenizer.decode(answer[-1]) == end
    assert Encoder(tokenizer, terminators, 4096).encode(Conversation(tuple(TWO_TURNS)))


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_a_system_prompt_in_the_middle_is_refused_where_it_has_no_place(name: str) -> None:
    tokenizer = make_tokenizer("<s>", "</s>", CARDS[name][2])
    set_template(tokenizer, find_template(name))
    with pytest.raises(UsageError, match="a system message comes first"):
        render_prompt(tokenizer, [*QUESTION, Message("system", "Be brief."), *QUESTION])


@pytest.mark.parametrize(
    ("alias", "name"), [("qwen", "chatml"), ("Yi", "chatml"), ("phi", "phi3"), ("LLaMA2", "llama2")]
)
def test_families_are_known_by_their_own_names(alias: str, name: str) -> None:
    assert find_template(alias) == find_template(name)


# A user's own file

OWN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN, encoding="utf-8")
    tokenizer = make_tokenizer("", "</s>")
    assert choose_template(tokenizer, str(tmp_path / "own.jinja")) == []
    assert render_text(tokenizer, QUESTION, for_answer=True) == "user: Hi</s>assistant: "


BAD_FILES = {
    "syntax": (b"{% for message in messages %}\n{{ message['content'] }\n{% endfor %}", "line 2 is no valid jinja"),
    "no loop": (b"Hello!", "it leaves out the first question"),
    "questions only": (
        b"{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "leaves out the first answer",
    ),
    "raises": (b"{{ raise_exception('Never.') }}", "fails on a conversation of user, assistant, user: Never"),
    "breaks out": (b"{{ messages.__class__.__mro__ }}", "fails on a conversation"),
    "wrong types": (b"{{ messages[0]['content'] + 1 }}", "fails on a conversation"),
    "no text": (b"\xff\xfe\x00", "is not UTF-8"),
    "too large": (b" " * 200_001, "200001 bytes; a chat template has at most 200000"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_template_is_refused_with_its_name(kind: str, tmp_path: Path) -> None:
    content, reason = BAD_FILES[kind]
    path = tmp_path / "own.jinja"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        find_template(str(path))
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"own.jinja does not exist"):
        find_template(str(tmp_path / "own.jinja"))
    (tmp_path / "own.jinja").mkdir()
    with pytest.raises(UsageError, match="is no file"):
        find_template(str(tmp_path / "own.jinja"))


def test_an_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'chat-ml' is no chat template; did you mean 'chatml'\?"):
        find_template("chat-ml")


# The tokenizer's side


def test_auto_keeps_the_tokenizers_own(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before = tokenizer.chat_template
    assert choose_template(tokenizer, "auto") == []
    assert tokenizer.chat_template == before


def test_auto_without_a_template_names_the_bundled_and_guesses() -> None:
    tokenizer = make_tokenizer("<s>", "</s>")
    with pytest.raises(UsageError) as caught:
        choose_template(tokenizer, "auto", "meta-llama/Llama-2-7b-hf", "llama")
    assert str(caught.value) == (
        "The tokenizer of meta-llama/Llama-2-7b-hf has no chat template; 'llama2' looks like its family's; name one of "
        "alpaca, baichuan2, chatglm3, chatml, deepseek, gemma, glm4, hermes, internlm2, llama2, llama3, mistral, phi3, "
        "vicuna, zephyr, or give the path of a .jinja file."
    )


@pytest.mark.parametrize(
    ("name", "model_type", "guess"),
    [
        ("Qwen/Qwen2.5-0.5B", "qwen2", "chatml"),
        ("meta-llama/Meta-Llama-3-8B", "llama", "llama3"),
        ("meta-llama/Llama-3.2-1B", "llama", "llama3"),
        ("models/phil/my-own", "gemma2", "gemma"),
        ("cognitive/dolphin", "mistral", "mistral"),
        ("lmsys/vicuna-7b-v1.5", "llama", "vicuna"),
        ("THUDM/chatglm3-6b", "chatglm", "chatglm3"),
        ("THUDM/glm-4-9b", "glm", "glm4"),
        ("deepseek-ai/deepseek-llm-7b-base", "llama", "deepseek"),
        ("EleutherAI/pythia-70m", "gpt_neox", None),
    ],
)
def test_a_family_is_guessed_by_name_then_by_type(name: str, model_type: str, guess: str | None) -> None:
    assert guess_template(name, model_type) == guess


def test_an_end_that_is_no_token_is_refused_and_nothing_is_changed() -> None:
    tokenizer = make_tokenizer("<s>", "</s>")
    with pytest.raises(UsageError) as caught:
        set_template(tokenizer, find_template("chatml"))
    assert str(caught.value) == (
        "The template ends an answer with '<|im_end|>', which is not a token of this tokenizer (but 10 of them), so "
        "generation could not stop there; take a template that ends with </s>, the tokenizer's own end, such as alpaca."
    )
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == "</s>"


def test_a_template_without_an_end_wants_an_end_of_sequence() -> None:
    with pytest.raises(UsageError, match="names no end of sequence"):
        set_template(make_tokenizer("", ""), find_template("glm4"))


def test_marks_of_roles_may_be_plain_text_and_are_noted() -> None:
    tokenizer = make_tokenizer("<s>", "</s>")
    notes = set_template(tokenizer, find_template("zephyr"))
    assert notes == ["<|user|>, <|assistant|> in the template: no tokens of this tokenizer; encoded as plain text."]
    _, answer = render_turn(tokenizer, TWO_TURNS, (tokenizer.eos_token_id,))
    assert tokenizer.decode(answer) == "Bye!</s>"


def test_the_templates_end_becomes_the_end_of_sequence_and_is_saved(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    notes = set_template(tokenizer, find_template("chatml"))
    assert notes == ["The template ends answers with <|im_end|>, which is now the end of sequence."]
    tokenizer.save_pretrained(tmp_path)

    again = AutoTokenizer.from_pretrained(tmp_path)

    assert (tmp_path / "chat_template.jinja").exists()
    assert again.eos_token == "<|im_end|>"
    assert render_prompt(again, TWO_TURNS[:3]) == render_prompt(tokenizer, TWO_TURNS[:3])


def test_the_end_of_sequence_stays_where_the_template_uses_it_for_something_else() -> None:
    tokenizer = make_tokenizer("", "</s>", "<|end|>")
    set_template(
        tokenizer,
        "{% for m in messages %}{{ m.content + (eos_token if m.role == 'user' else '<|end|>') }}{% endfor %}",
    )
    assert tokenizer.eos_token == "</s>"
    assert answer_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_a_tokenizers_own_template_tells_where_answers_end(chat_tokenizer: ChatTokenizer) -> None:
    ends = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>", "bare": None}
    for name, end in ends.items():
        tokenizer, _ = chat_tokenizer(name)
        found = answer_end(tokenizer)
        assert (found if found is None else tokenizer.decode(found)) == end, name
        expected = (7,) if found is None else (7, found)
        assert add_answer_end((7,), tokenizer) == add_answer_end(expected, tokenizer) == expected
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    assert answer_end(without) is None
