"""A session keeps the conversation, feeds exactly that to the assistant, and stays whole whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest

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
        self.asked: list[tuple[list[Mapping[str, str]], GenerationOptions | None]] = []
        self.closed = False

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
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
