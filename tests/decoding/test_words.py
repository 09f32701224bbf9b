"""What tokens say: words of prose, parts of words, characters, numbers, and the signs of code and tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lory.decoding.words import Substance, Words


@pytest.fixture(scope="module")
def words(smollm2: Path) -> Words:
    return Words(AutoTokenizer.from_pretrained(smollm2))


@pytest.mark.parametrize(
    ("text", "substance"),
    [
        (" harbour", Substance.WORD),
        (" a", Substance.WORD),
        ("word", Substance.PART),
        ("7", Substance.NUMBER),
        (",", Substance.SIGN),
        (" x", Substance.SIGN),
        ("\n", Substance.SIGN),
        ("_", Substance.CODE),
        ("|", Substance.CODE),
        ("\n    ", Substance.CODE),
        ("();", Substance.CODE),
        ("的", Substance.WORD),
    ],
)
def test_a_token_says_something(text: str, substance: Substance, words: Words, smollm2: Path) -> None:
    ids = AutoTokenizer.from_pretrained(smollm2)(text, add_special_tokens=False)["input_ids"]
    assert words(ids[0]) is substance
    assert len(ids) == 1


def test_a_part_of_a_character_is_known_as_one(words: Words, smollm2: Path) -> None:
    ids = AutoTokenizer.from_pretrained(smollm2)("🚀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert {words(token) for token in ids} == {Substance.BYTES}
