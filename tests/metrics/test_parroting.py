"""The four kinds of parroting are found and told apart, and what people write on purpose is left alone."""

from __future__ import annotations

import pytest

from lory.metrics.parroting import Parroting, find_parroting
from lory.runtime import UsageError

SORRY = "I am sorry, but I do not know that."


def kinds(*answers: str) -> list[str]:
    """Of answers to prompts of their own."""
    return [found.kind for found in find_parroting([f"Question {n}?" for n in range(len(answers))], answers)]


@pytest.mark.parametrize(
    ("answer", "copies", "text"),
    [
        ("It is the the the the the the end", 6, "the"),
        ("So I went on and on and on and on and on and", 5, "on and"),
        ("哈哈哈哈哈哈哈", 7, "哈"),
        ("Ha! Ha! Ha! HA! Ha!", 5, "ha"),
    ],
)
def test_a_word_again_and_again(answer: str, copies: int, text: str) -> None:
    assert find_parroting(["Well?"], [answer]) == [Parroting("word", (0,), copies, text)]


@pytest.mark.parametrize(
    ("answer", "copies", "text"),
    [
        ("I like red cats a lot. " * 4, 4, "I like red cats a lot."),
        ("I like cats. I LIKE cats. I like cats! I like cats. I like", 4, "I like cats."),
        ("I like cats. " * 9, 9, "I like cats."),
        ("It is late. I must go home. It rains. I must go home. You see, I must go home.", 2, None),
        ("It is late. I must go home. It rains. I must go home. Dear me! I must go home.", 3, "I must go home."),
        ("我喜欢小猫。我喜欢小猫。我喜欢小猫。", 3, "我喜欢小猫。"),
        ("he came and she left and then " * 3, 3, "he came and she left and then"),
        ("First one. Second one. Third one. And a fourth one! " * 3 + "First", 3, None),
    ],
)
def test_a_sentence_again_and_again(answer: str, copies: int, text: str | None) -> None:
    found = find_parroting(["Well?"], [answer])
    if copies < 3:
        assert found == []
        return
    assert [(one.kind, one.copies) for one in found] == [("sentence", copies)]
    assert text is None or found[0].text == text


def test_the_same_answer_again_and_again_to_one_prompt() -> None:
    answers = [
        "A joke about cats and dogs.",
        "Something else.",
        "a joke about cats and dogs",
        "A joke about cats and dogs",
    ]
    found = find_parroting(["Tell me a joke!", "tell me a joke", "Tell me a joke.", "Tell me a joke"], answers)
    assert found == [Parroting("answer", (0, 2, 3), 3, answers[0])]


def test_the_same_empty_answer_to_different_prompts() -> None:
    prompts = ["Who wrote Faust?", "What is iron?", "Where is Oslo?", "How far is the moon?"]
    found = find_parroting(prompts, [SORRY, "A metal.", SORRY, SORRY])
    assert found == [Parroting("evasion", (0, 2, 3), 3, SORRY)]
    assert kinds("", "", "") == ["evasion"]


def test_the_same_answer_to_two_prompts_only_is_no_evasion() -> None:
    assert kinds(SORRY, SORRY, "A metal.") == []
    # nor to one prompt in three spellings
    prompts = ["What is iron?", "what is iron", "What is Iron"]
    assert [found.kind for found in find_parroting(prompts, [SORRY] * 3)] == ["answer"]


def test_one_answer_can_be_of_several_kinds() -> None:
    assert kinds("no no no no no no no", *["I am a cat. " * 3] * 3) == ["word", *["sentence"] * 3, "evasion"]


@pytest.mark.parametrize(
    "answer",
    [
        "No, no, no, that is very, very, very good.",
        "Row, row, row your boat, gently down the stream.",
        "0 0 0 0 0 0 0 0\n0 1 0 1 0 1 0 1\n|---|---|---|---|",
        "- red apples\n- green apples\n- yellow apples\n- ripe apples\n- sour apples",
        "\n".join(f'if operator == "{sign}":\n    return one {sign} two' for sign in "+-*/"),
        "<li>one</li>\n<li>two</li>\n<li>three</li>\n<li>four</li>\n<li>five</li>",
        "The sun went down behind the hill.\nThe birds flew home to rest.\nOh, come to me, my love.\n"
        "The moon rose up above the mill.\nThe wind blew from the west.\nOh, come to me, my love.\n"
        "The stars were shining on the sea.\nThe boats lay on the sand.\nOh, come to me, my love.",
        "1. Yes.\n2. No.\n3. Yes.\n4. Yes.\n5. Yes.",
        "",
    ],
)
def test_what_is_meant_to_repeat_is_left_alone(answer: str) -> None:
    assert kinds(answer) == []


def test_labels_may_be_given_to_many_prompts() -> None:
    assert kinds(*["positive", "Yes.", "42"] * 5) == []


def test_each_answer_needs_its_prompt() -> None:
    with pytest.raises(UsageError, match="1 prompts were given for 2 answers"):
        find_parroting(["a"], ["b", "c"])
