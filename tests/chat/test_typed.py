"""Texts of several lines: what joins lines, what does not, and what is sent."""

from __future__ import annotations

import pytest

from lory.chat.typed import Lines, Typed, fold, is_open
from lory.runtime import UsageError


def read(*lines: str) -> list[Typed]:
    reader = Lines()
    found = [typed for line in lines if (typed := reader.add(line)) is not None]
    assert not reader.open
    return found


def test_a_line_is_a_text() -> None:
    assert read(" hi ", "", ":help") == [Typed("hi"), Typed(""), Typed(":help")]


def test_a_backslash_at_the_end_of_a_line_joins_the_next() -> None:
    assert read("one\\", "  two\\", "three", "four") == [Typed("one\n  two\nthree"), Typed("four")]
    assert read(":system You are\\", "brief.") == [Typed(":system You are\nbrief.")]


def test_the_end_of_a_line_of_latex_is_text() -> None:
    assert read(r"a & b \\", r"c \\\\") == [Typed(r"a & b \\"), Typed(r"c \\\\")]
    assert read("a \\\\\\", "b") == [Typed("a \\\\\nb")]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (('"""', ":exit", "", "  two\\", '"""'), ":exit\n\n  two\\"),
        (('"""one', 'two"""'), "one\ntwo"),
        (('  """one line"""  ',), "one line"),
        (('""""""',), ""),
        (('"""', 'a """ b', '"""'), 'a """ b'),
    ],
)
def test_a_block_in_triple_quotes_is_sent_as_it_is(lines: tuple[str, ...], text: str) -> None:
    assert read(*lines) == [Typed(text, literal=True)]


def test_a_block_that_is_not_closed_is_not_sent() -> None:
    reader = Lines()
    assert reader.add('"""') is reader.add("hi") is None
    assert reader.open
    with pytest.raises(UsageError, match="was not closed"):
        reader.close()
    assert reader.add("next") == Typed("next")


def test_a_backslash_at_the_end_of_all_is_text() -> None:
    reader = Lines()
    assert reader.add("hi\\") is None
    assert reader.close() == Typed("hi\\")


@pytest.mark.parametrize(
    ("text", "whole"), [("hi", True), ("hi\\", False), ("a\nb", True), ('"""a\nb', False), ('"""a\nb"""', True)]
)
def test_whole_texts_are_known(text: str, whole: bool) -> None:
    assert is_open(text) is not whole


def test_lines_that_were_pasted_stay_apart() -> None:
    assert fold("one\ntwo\\\nthree\n") == Typed("one\ntwo\nthree")
