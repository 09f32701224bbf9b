"""Conversations on the page: questions and answers take turns, and asking otherwise begins a branch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lory.chat.web.conversations import UNTITLED, Conversation, Shelf
from lory.runtime import UsageError


def talk(*pairs: tuple[str, str]) -> Conversation:
    conversation = Conversation()
    for question, answer in pairs:
        conversation.ask(question)
        conversation.answer(answer, "mine", "stop")
    return conversation


def said(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.shown]


def test_the_model_is_given_system_prompt_and_turns() -> None:
    conversation = talk(("Hi", "Hello"))
    conversation.system = "Be kind."
    conversation.ask("Who are you?")
    assert conversation.messages() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who are you?"},
    ]
    assert conversation.awaits_answer


def test_pictures_come_before_the_text() -> None:
    conversation = Conversation()
    conversation.ask("What is it?", ["/a.png"])
    (message,) = conversation.messages()
    assert message["content"] == [{"type": "image", "image": "/a.png"}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_question_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        Conversation().ask(text)


def test_questions_and_answers_take_turns() -> None:
    conversation = Conversation()
    with pytest.raises(UsageError, match="no question"):
        conversation.answer("Hello")
    conversation.ask("Hi")
    with pytest.raises(UsageError, match="no answer yet"):
        conversation.ask("Hi again")


def test_another_answer_is_a_branch_and_the_first_stays() -> None:
    conversation = talk(("Hi", "one"))
    conversation.regenerate()
    assert conversation.awaits_answer
    conversation.answer("two")
    assert (said(conversation), conversation.branch()) == (["Hi", "two"], (2, 2))
    conversation.go(-1)
    assert (said(conversation), conversation.branch()) == (["Hi", "one"], (1, 2))
    conversation.go(-1)
    assert said(conversation) == ["Hi", "two"]


def test_a_question_in_the_middle_can_be_rewritten() -> None:
    conversation = talk(("a", "A"), ("b", "B"), ("c", "C"))
    conversation.edit(2, "x")
    assert said(conversation) == ["a", "A", "x"]
    conversation.answer("X")
    assert conversation.branch() == (2, 2)
    conversation.go(1)
    assert said(conversation) == ["a", "A", "b", "B", "c", "C"]


def test_a_rewritten_question_keeps_its_pictures() -> None:
    conversation = Conversation()
    conversation.ask("this?", ["/a.png"])
    conversation.answer("A cat.")
    conversation.edit(0, "and now?")
    assert conversation.shown[0].images == ("/a.png",)


@pytest.mark.parametrize(("position", "text"), [(9, "x"), (-1, "x"), (0, " ")])
def test_what_cannot_be_edited_is_refused(position: int, text: str) -> None:
    with pytest.raises(UsageError):
        talk(("a", "A")).edit(position, text)


def test_an_earlier_answer_can_be_given_anew() -> None:
    conversation = talk(("a", "A"), ("b", "B"))
    conversation.regenerate(1)
    assert said(conversation) == ["a"]
    with pytest.raises(UsageError, match="no answer"):
        Conversation().regenerate()


def test_a_question_taken_back_is_still_a_branch() -> None:
    conversation = talk(("a", "A"), ("b", "B"))
    assert conversation.take_back().text == "b"
    assert (said(conversation), conversation.branch()) == (["a", "A"], (0, 1))
    conversation.go(1)
    assert said(conversation) == ["a", "A", "b", "B"]


def test_giving_up_leaves_everything_as_it_was() -> None:
    conversation = talk(("a", "A"))
    before = conversation.to_json()
    for begin in (lambda: conversation.ask("b"), lambda: conversation.edit(0, "x"), conversation.regenerate):
        begin()
        conversation.cancel()
        assert {**conversation.to_json(), "used": 0} == {**before, "used": 0}
    conversation.cancel()
    assert said(conversation) == ["a", "A"]
    empty = Conversation()
    empty.ask("?")
    empty.cancel()
    assert (empty.turns, empty.leaf) == ([], None)


def test_it_is_called_by_its_first_question() -> None:
    assert Conversation().title == UNTITLED
    assert talk(("Hi\n there", "Hello")).title == "Hi there"
    assert len(talk(("word " * 50, "Hello")).title) <= 40


def test_it_comes_back_from_json_as_it_was() -> None:
    conversation = talk(("a", "A"), ("ü 你好", "B"))
    conversation.regenerate()
    conversation.answer("C")
    stored = json.loads(json.dumps(conversation.to_json()))
    assert Conversation.from_json(stored) == conversation


BROKEN: list[Any] = [
    None,
    [],
    {"turns": 3},
    {"leaf": 7},
    {"leaf": True},
    {"id": 5},
    {"used": "now"},
    {"turns": [{"role": "user"}]},
    {"turns": [{"role": "system", "text": "x", "images": [], "model": "", "ending": "", "parent": None}]},
    {"turns": [{"role": "assistant", "text": "x", "images": [], "model": "", "ending": "", "parent": None}]},
    # a turn that follows itself would be walked round for ever
    {"turns": [{"role": "user", "text": "x", "images": [], "model": "", "ending": "", "parent": 0}]},
]


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_one_is_refused(change: Any) -> None:
    whole = talk(("a", "A")).to_json()
    with pytest.raises(UsageError):
        Conversation.from_json({**whole, **change} if isinstance(change, dict) else change)


def test_the_shelf_lists_the_last_used_first_and_forgets_what_is_deleted() -> None:
    shelf = Shelf()
    shelf.keep()
    assert shelf.listed() == []
    old, new = talk(("old", "A")), talk(("new", "B"))
    old.used, new.used = 1.0, 2.0
    assert shelf.restore([old.to_json(), {"broken": 1}, new.to_json()]) == 1
    assert [one.title for one in shelf.listed()] == ["new", "old"]
    shelf.open(old.id)
    assert said(shelf.current) == ["old", "A"]
    assert shelf.delete() == old.id
    assert [one.title for one in shelf.listed()] == ["new"]
    assert shelf.current.turns == []
    with pytest.raises(UsageError, match="gone"):
        shelf.open(old.id)


def test_a_new_conversation_keeps_the_system_prompt() -> None:
    shelf = Shelf(current=Conversation(system="Be brief."))
    shelf.begin()
    assert shelf.current.system == "Be brief."
