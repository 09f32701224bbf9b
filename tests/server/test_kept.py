"""Keys and values of earlier texts are found again by the tokens that a new prompt begins with."""

from __future__ import annotations

from typing import Any

from lory.server.kept import KeptTexts

STATES: Any = [object() for _ in range(4)]


def test_the_longest_beginning_is_found_and_a_token_left_to_read() -> None:
    kept = KeptTexts(1000)
    kept.keep(range(20), None, STATES[0])
    kept.keep([*range(30), 99], None, STATES[1])
    assert kept.find([*range(30), 5], None) == (STATES[1], 30)
    assert kept.find(range(20), None) == (STATES[1], 19)
    assert kept.find([*range(15), 500, 501], None) == ([], 0)


def test_another_adapters_text_is_another_text() -> None:
    kept = KeptTexts(1000)
    kept.keep(range(40), 1, STATES[0])
    assert kept.find(range(40), None) == ([], 0)
    assert kept.find(range(40), 1) == (STATES[0], 39)
    kept.forget(1)
    assert kept.find(range(40), 1) == ([], 0)


def test_what_was_used_longest_ago_makes_room() -> None:
    kept = KeptTexts(60)
    kept.keep(range(20), None, STATES[0])
    kept.keep(range(100, 120), None, STATES[1])
    kept.keep(range(200, 220), None, STATES[2])
    assert kept.find(range(30), None) == (STATES[0], 20)
    kept.keep(range(300, 320), None, STATES[3])
    assert kept.find(range(100, 130), None) == ([], 0)
    assert kept.find(range(30), None) == (STATES[0], 20)


def test_a_text_takes_the_place_of_its_beginning() -> None:
    kept = KeptTexts(100)
    kept.keep(range(20), None, STATES[0])
    kept.keep(range(90), None, STATES[1])
    kept.keep(range(500, 510), None, STATES[2])
    assert kept.find(range(20), None) == (STATES[1], 19)


def test_too_long_or_short_a_text_is_not_wanted() -> None:
    assert [KeptTexts(100).wants(tokens) for tokens in (5, 50, 101)] == [False, True, False]
    assert not KeptTexts(0).wants(50)
