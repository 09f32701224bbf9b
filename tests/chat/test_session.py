"""A session keeps the conversation, feeds exactly that to the assistant, and stays whole whatever happens."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from PIL import Image

from lory.chat.pictures import Picture
from lory.chat.session import Session
from lory.generate import Ending, GenerationOptions
from lory.runtime import LoryError, UsageError


class FakeAssistant:
    """Says `pieces`, then raises `failure` if there is one; notes what it was asked and whether it was closed."""

    name = "fake"

    def __init__(self, *pieces: str, failure: BaseException | None = None) -> None:
        self.pieces = pieces
        self.failure = failure
        self.options = GenerationOptions(max_new_tokens=7)
        self.asked: list[tuple[list[Mapping[str, Any]], GenerationOptions | None]] = []
        self.closed = False

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: GenerationOptions | None = None,
        ending: Ending | None = None,
    ) -> Iterator[str]:
        self.asked.append((list(messages), options))
        try:
            yield from self.pieces
            if self.failure:
                raise self.failure
        finally:
            self.closed = True


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_an_answer_streams_and_then_joins_the_history() -> None:
    session = Session(FakeAssistant("Hel", "lo"))
    pieces = session.ask("Hi")
    assert next(pieces) == "Hel"
    assert session.history == []
    assert list(pieces) == ["lo"]
    assert session.history == exchange("Hi", "Hello")


def test_the_assistant_is_given_the_system_prompt_the_history_and_the_question() -> None:
    assistant = FakeAssistant("A")
    session = Session(assistant, system="Be brief.")
    list(session.ask("1"))
    list(session.ask("2"))
    system = {"role": "system", "content": "Be brief."}
    assert assistant.asked[1][0] == [system, *exchange("1", "A"), {"role": "user", "content": "2"}]
    assert session.messages == [system, *exchange("1", "A"), *exchange("2", "A")]


def test_an_empty_system_prompt_is_not_the_same_as_none() -> None:
    assert Session(FakeAssistant(), system="").messages == [{"role": "system", "content": ""}]
    assert Session(FakeAssistant()).messages == []


def test_a_complete_answer_is_kept_even_if_it_is_empty() -> None:
    session = Session(FakeAssistant())
    assert list(session.ask("Hi")) == []
    assert session.history == exchange("Hi", "")


def test_closing_early_keeps_what_was_said_and_stops_the_generation() -> None:
    assistant = FakeAssistant("one ", "two ", "three")
    session = Session(assistant)
    pieces = session.ask("Count")
    next(pieces)
    next(pieces)
    assert not assistant.closed
    pieces.close()
    assert assistant.closed
    assert session.history == exchange("Count", "one two ")


def test_ctrl_c_inside_the_assistant_keeps_what_was_said() -> None:
    session = Session(FakeAssistant("one ", failure=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("Count"))
    assert session.history == exchange("Count", "one ")


@pytest.mark.parametrize(
    ("pieces", "failure"),
    [((), KeyboardInterrupt()), (("one ",), LoryError("The device is out of memory."))],
    ids=["stopped before the first word", "failed half way"],
)
def test_a_question_without_an_answer_leaves_no_trace(pieces: tuple[str, ...], failure: BaseException) -> None:
    session = Session(FakeAssistant(*pieces, failure=failure))
    session.history = exchange("before", "yes")
    with pytest.raises(type(failure)):
        list(session.ask("Count"))
    assert session.history == exchange("before", "yes")


def test_closing_before_the_first_word_leaves_no_trace() -> None:
    session = Session(FakeAssistant("", "late"))
    pieces = session.ask("Hi")
    assert next(pieces) == ""
    pieces.close()
    assert session.history == []


def test_clear_forgets_the_history_and_nothing_else() -> None:
    session = Session(FakeAssistant("A"), system="Be brief.")
    session.set_seed(3)
    list(session.ask("1"))
    session.clear()
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    assert session.seed == 3


def test_options_are_the_assistants_unless_given() -> None:
    assert Session(FakeAssistant()).options.max_new_tokens == 7
    assert Session(FakeAssistant(), options=GenerationOptions()).options == GenerationOptions()


def test_set_options_reads_several_and_the_assistant_gets_them() -> None:
    assistant = FakeAssistant("A")
    session = Session(assistant)
    session.set_options("do_sample=true temperature = 0.7  top_k=5")
    list(session.ask("1"))
    expected = GenerationOptions(max_new_tokens=7, do_sample=True, temperature=0.7, top_k=5)
    assert assistant.asked[0][1] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_k=3 temprature=1", "did you mean 'temperature'"),
        ("top_k=3 max_new_tokens=many", "'max_new_tokens' was given 'many'"),
        ("top_k=3 hot", "'hot' was given"),
        ("=1 top_k=3", "'=1' was given"),
    ],
)
def test_a_wrong_option_is_refused_and_changes_nothing(text: str, message: str) -> None:
    session = Session(FakeAssistant())
    before = session.options
    with pytest.raises(UsageError, match=message):
        session.set_options(text)
    assert session.options == before


def test_the_seed_is_one_of_the_options() -> None:
    session = Session(FakeAssistant())
    assert session.seed is None
    session.set_seed(11)
    assert session.seed == session.options.seed == 11
    session.set_options("seed=12")
    assert session.seed == 12
    session.set_seed(None)
    assert session.seed is None


def test_reset_goes_back_to_the_first_options() -> None:
    first = GenerationOptions(temperature=0.5, do_sample=True)
    session = Session(FakeAssistant(), options=first)
    session.set_options("temperature=0.9 seed=4")
    session.reset_options()
    assert session.options == first


# Pictures, and answers made anew


def picture(colour: str = "red") -> Picture:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return Picture(f"{colour}.png", file.getvalue())


def test_pictures_stand_at_their_marks_in_what_the_assistant_is_given() -> None:
    assistant = FakeAssistant("A")
    session = Session(assistant)
    red, blue = picture(), picture("blue")
    list(session.ask("Is <image> like <image>?", [red, blue]))
    list(session.ask("Why?"))
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": red.data},
        {"type": "text", "text": " like "},
        {"type": "image", "image": blue.data},
        {"type": "text", "text": "?"},
    ]
    asked = assistant.asked[1][0]
    assert [message["content"] for message in asked] == [parts, "A", "Why?"]
    assert session.history[0]["content"] == "Is <image> like <image>?"


def test_a_question_without_a_mark_has_its_pictures_first() -> None:
    session = Session(FakeAssistant("A"))
    list(session.ask("What is it?", [picture()]))
    assert session.history[0]["content"] == "<image>What is it?"
    with pytest.raises(UsageError, match="1 <image> for 2 images"):
        list(session.ask("<image>?", [picture(), picture()]))
    assert len(session.history) == 2


def test_an_answer_made_anew_takes_the_place_of_the_one_before() -> None:
    assistant = FakeAssistant("one")
    session = Session(assistant)
    list(session.ask("1"))
    list(session.ask("2", [picture()]))
    assistant.pieces = ("an", "other")
    assert "".join(session.regenerate()) == "another"
    assert assistant.asked[2] == assistant.asked[1]
    assert session.history[:2] == exchange("1", "one")
    assert session.history[3] == {"role": "assistant", "content": "another"}
    assert session.history[2]["images"] == (picture(),)


@pytest.mark.parametrize("failure", [LoryError("Out of memory."), KeyboardInterrupt()])
def test_the_answer_before_stays_if_there_is_no_other(failure: BaseException) -> None:
    assistant = FakeAssistant("one")
    session = Session(assistant)
    list(session.ask("1"))
    assistant.pieces, assistant.failure = (), failure
    with pytest.raises(type(failure)):
        list(session.regenerate())
    assert session.history == exchange("1", "one")


def test_one_that_is_stopped_half_way_is_kept_as_far_as_it_came() -> None:
    assistant = FakeAssistant("one")
    session = Session(assistant)
    list(session.ask("1"))
    assistant.pieces = ("an", "other")
    pieces = session.regenerate()
    next(pieces)
    pieces.close()
    assert session.history == exchange("1", "an")


def test_there_is_nothing_to_make_anew_before_the_first_question() -> None:
    with pytest.raises(UsageError, match="Nothing was asked yet"):
        list(Session(FakeAssistant()).regenerate())
