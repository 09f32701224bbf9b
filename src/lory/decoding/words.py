"""What a token says: whether it is a word of prose, or one of the signs that code, tables and rules of dashes have."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Substance(IntEnum):
    """What a token says."""

    CODE = 0
    """What source code and tables have more of than prose: brackets, rules, underscores, indentation."""
    SIGN = 1
    """Other punctuation, spaces, lone letters, AAAA."""
    NUMBER = 2
    BYTES = 3
    """A part of a character."""
    PART = 4
    """A word that does not stand after a space, or a part of one."""
    WORD = 5
    """A word after a space, or of a script without upper and lower case."""


_ONE_LETTER_WORDS = frozenset("aAI")
_CODE = re.compile(r"[_{}\[\]=<>|\\/&^%$@+;]|::|\(\)|\S\(|^\(|\)\)|\)[,.:]|\n[ \t]|\t|  ")


class Words:
    """What each token of a tokenizer says; looked up when it is asked for, once for each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Substance] = {}

    def __call__(self, token: int) -> Substance:
        """What the token says."""
        known = self._known.get(token)
        if known is None:
            text = self._tokenizer.decode([token])
            # twice, since many tokenizers drop a text's first space
            spaced = self._tokenizer.decode([token, token]).strip() == f"{text.strip()} {text.strip()}"
            known = self._known[token] = _weigh(text, spaced)
        return known

    def weigh_letters(self, tokens: list[int]) -> int:
        """How many different letters tokens have; of a script without upper and lower case one counts three times."""
        letters = {letter.lower() for letter in self._tokenizer.decode(tokens) if letter.isalpha()}
        return sum(3 if letter == letter.upper() else 1 for letter in letters)


def _weigh(text: str, spaced: bool) -> Substance:
    if _CODE.search(text):
        return Substance.CODE
    bare = text.strip()
    letters = {character.lower() for character in bare if character.isalpha()}
    # a script without upper and lower case says more in a letter; AAAA, on the other hand, says nothing
    if any(letter == letter.upper() for letter in letters):
        return Substance.WORD
    if len(letters) >= 2 or bare in _ONE_LETTER_WORDS:
        return Substance.WORD if spaced and bare.isalpha() else Substance.PART
    if "\ufffd" in text:
        return Substance.BYTES
    return Substance.NUMBER if bare.isdigit() else Substance.SIGN
