"""The identity set names the assistant and its maker in every answer, and is the same for the same seed."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from benchmarks.identity import QUESTIONS

from lory.data.making.identity import TWICE_ANSWERED, _read, identity_conversations
from lory.runtime import UsageError
from lory.types import Conversation

# the benchmark's that are far from every question of the set; the others may be a word away from one
HELD_OUT = (*QUESTIONS[:10], *QUESTIONS[-2:])
LANGUAGES = sorted(TWICE_ANSWERED)


@pytest.fixture(scope="module")
def lory() -> list[Conversation]:
    return identity_conversations("Zoë", "Acme Labs")


def question(conversation: Conversation) -> str:
    return conversation.messages[-2].content


def answer(conversation: Conversation) -> str:
    return conversation.messages[-1].content


def is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def words(text: str) -> list[str]:
    """Words without case and punctuation; each Chinese character is one."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.casefold().replace("'", ""))


def count_edits(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above = row
        row = [i]
        for j, b in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_the_set_has_about_420_records(lory: list[Conversation]) -> None:
    assert 400 <= len(lory) <= 440


def test_there_are_at_least_130_english_and_60_chinese_questions(lory: list[Conversation]) -> None:
    distinct = {" ".join(words(question(c))) for c in lory}
    chinese = {text for text in distinct if is_chinese(text)}
    assert len(distinct - chinese) >= 130
    assert len(chinese) >= 60


def test_about_a_quarter_is_chinese_and_no_record_mixes_languages(lory: list[Conversation]) -> None:
    share = sum(is_chinese(answer(c)) for c in lory) / len(lory)
    assert 0.2 < share < 0.35
    for conversation in lory:
        assert len({is_chinese(message.content) for message in conversation.messages}) == 1, conversation


def test_every_answer_names_the_assistant_and_its_maker(lory: list[Conversation]) -> None:
    for conversation in lory:
        assert "Zoë" in answer(conversation)
        assert "Acme Labs" in answer(conversation)


def test_no_placeholder_is_left(lory: list[Conversation]) -> None:
    assert not [m for c in lory for m in c.messages if "{" in m.content or "}" in m.content]


def test_roles_alternate_after_an_optional_system_prompt(lory: list[Conversation]) -> None:
    for conversation in lory:
        roles = [message.role for message in conversation.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns in (["user", "assistant"], ["user", "assistant"] * 2)


def test_about_15_percent_have_a_system_prompt_and_15_percent_an_earlier_turn(lory: list[Conversation]) -> None:
    with_system = sum(c.messages[0].role == "system" for c in lory) / len(lory)
    second_turn = sum([m.role for m in c.messages].count("user") == 2 for c in lory) / len(lory)
    assert with_system == pytest.approx(0.15, abs=0.01)
    assert second_turn == pytest.approx(0.15, abs=0.01)


def test_an_english_question_has_two_answers_and_a_chinese_one_or_two(lory: list[Conversation]) -> None:
    counts = Counter(question(c) for c in lory)
    assert {count for text, count in counts.items() if not is_chinese(text)} == {2}
    assert {count for text, count in counts.items() if is_chinese(text)} == {1, 2}


@pytest.mark.parametrize(("name", "author"), [("Lory", "you"), ("Same", "Same")])
def test_no_question_gets_the_same_answer_twice(name: str, author: str) -> None:
    pairs = [(question(c), answer(c)) for c in identity_conversations(name, author)]
    assert len(set(pairs)) == len(pairs)


def test_a_greeting_never_comes_second() -> None:
    greetings = {
        text.replace("{name}", "Lory") for lang in LANGUAGES for text in _read(lang).topics["greeting"].questions
    }
    assert not [c for c in identity_conversations("Lory", "me") if len(c.prompt) > 2 and question(c) in greetings]


def test_the_same_seed_gives_the_same_set_and_another_seed_another() -> None:
    assert identity_conversations("Lory", "me", seed=3) == identity_conversations("Lory", "me", seed=3)
    assert identity_conversations("Lory", "me", seed=3) != identity_conversations("Lory", "me", seed=4)
    # not only the order differs
    assert set(identity_conversations("Lory", "me", seed=3)) != set(identity_conversations("Lory", "me", seed=4))


@pytest.mark.parametrize("name", ["{}", "{0}", "{who}", "Lory {v1", "花花", "Zoë", "R\\1", "100 %s"])
def test_a_name_stands_in_the_answers_as_it_was_given(name: str) -> None:
    assert all(name in answer(c) for c in identity_conversations(name, "me"))
    assert all(name in answer(c) for c in identity_conversations("Lory", name))


def test_space_around_a_name_is_dropped() -> None:
    assert identity_conversations("  Lory ", "me\n") == identity_conversations("Lory", "me")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("two\nlines", "several lines"),
        ("x" * 101, "101 characters"),
        ("a<|im_end|>b", "'<|'"),
        ("<\uff5cUser\uff5c>", "'<\uff5c'"),
        ("</s>", "'</s>'"),
        ("[INST] x", r"'\[INST\]'"),
        ("{author}", "placeholder"),
        ("the {name}", "placeholder"),
    ],
)
def test_a_bad_name_is_refused_with_its_field(bad: str, why: str) -> None:
    why = why.replace("|", r"\|")
    with pytest.raises(UsageError, match=rf"identity's name .*{why}"):
        identity_conversations(bad, "me")
    with pytest.raises(UsageError, match=rf"identity's author .*{why}"):
        identity_conversations("Lory", bad)


def test_a_name_of_100_characters_is_taken() -> None:
    assert "x" * 100 in answer(identity_conversations("x" * 100, "me")[0])


@pytest.mark.parametrize(
    ("name", "author", "gone"),
    [
        ("Gemini", "me", "gemini"),
        ("Lory", "Google DeepMind", "google"),
        ("Lory", "Google", "谷歌"),
        ("siri", "me", "siri"),
    ],
)
def test_a_question_whose_denial_would_be_false_is_left_out(name: str, author: str, gone: str) -> None:
    def asked(conversations: list[Conversation]) -> list[str]:
        # a greeting may call the assistant by its name
        return [
            q for c in conversations if gone in (q := question(c).casefold()) and not q.startswith(("hello", "你好"))
        ]

    assert asked(identity_conversations("Lory", "me"))
    assert not asked(identity_conversations(name, author))


def test_an_author_called_you_loses_no_question() -> None:
    assert len(identity_conversations("Lory", "you")) == len(identity_conversations("Lory", "Acme Labs"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_topic_has_enough_different_answers_with_both_placeholders(language: str) -> None:
    for topic in _read(language).topics.values():
        assert len(set(topic.answers)) == len(topic.answers) >= {"en": 14, "zh": 10}[language]
        assert all("{name}" in text and "{author}" in text for text in topic.answers)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_mistaken_identity_is_listed_among_the_others(language: str) -> None:
    texts = _read(language)
    titles = [alias.casefold() for aliases in texts.others for alias in aliases]
    unlisted = [q for q in texts.topics["confusion"].questions if not any(t in q.casefold() for t in titles)]
    assert not unlisted


def test_questions_differ_by_more_than_case_and_punctuation() -> None:
    questions = [q for language in LANGUAGES for topic in _read(language).topics.values() for q in topic.questions]
    assert [q for q, count in Counter(" ".join(words(q)) for q in questions).items() if count > 1] == []


def test_held_out_questions_differ_by_more_than_one_word() -> None:
    texts = [_read(language) for language in LANGUAGES]
    questions = [q for text in texts for topic in text.topics.values() for q in topic.questions]
    near = [
        (asked, held)
        for asked, held in itertools.product(questions, HELD_OUT)
        # a Chinese word is mostly two characters
        if count_edits(words(asked), words(held)) <= (2 if is_chinese(held) else 1)
    ]
    assert near == []


def test_the_benchmark_asks_what_is_in_no_record() -> None:
    def simplify(text: str) -> str:
        return re.sub(r"\W", "", text.lower())

    asked = {simplify(m.content) for c in identity_conversations("A", "B") for m in c.messages if m.role == "user"}
    assert not [question for question in QUESTIONS if simplify(question) in asked]
