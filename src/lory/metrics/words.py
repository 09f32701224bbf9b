"""Plain text as words and sentences, in any script, so that what is measured on tokens can be measured on text."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Hashable, Sequence

# scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han, and Han beyond 16 bits
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_SPACELESS += "\U00020000-\U000323af"
# a sentence ends with its mark and the closing quotes and brackets that follow, or with its line
_SENTENCE = re.compile(r"""[^\n]+?(?:[.!?…]+["'”’)\]]*(?=\s|$)|[。！？｡]+["'”’」』）]*|$)""", re.MULTILINE)

# what the pattern of all scripts finds in ASCII text, in a tenth of the time
_ASCII_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    # Python's \w leaves out the combining marks that Indian scripts write their vowels with
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M")
    letters = rf"[^\W_{_SPACELESS}]+(?:[{marks}]+[^\W_{_SPACELESS}]*)*"
    return re.compile(rf"(?=\w)[{_SPACELESS}][{marks}]*|{letters}(?:'{letters})*")


def split_words(text: str) -> list[str]:
    """The words of a text, casefolded and in Unicode's form NFC, without punctuation.

    A word is a run of letters, digits and marks, with apostrophes inside (written '). In scripts without spaces
    (Chinese, Japanese, Thai, ...) each character is a word, with the marks that belong to it.
    """
    pattern, plain = _prepare(text)
    return pattern.findall(plain)


def split_pieces(text: str) -> list[str]:
    """The words of a text as in `split_words`, each with the punctuation up to the next one, without white space."""
    pattern, plain = _prepare(text)
    borders = [*(match.start() for match in pattern.finditer(plain)), len(plain)]
    return ["".join(plain[start:end].split()) for start, end in itertools.pairwise(borders)]


def _prepare(text: str) -> tuple[re.Pattern[str], str]:
    """The pattern of a word and the text in which it is to be looked for."""
    text = text.casefold()
    if text.isascii():
        return _ASCII_WORD, text
    return _word_pattern(), unicodedata.normalize("NFC", text).replace("’", "'")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, none empty: up to . ! ? … before a space, to 。！？, or to the line's end."""
    return [sentence for part in _SENTENCE.findall(text) if (sentence := part.strip())]


def list_units(units: Sequence[Hashable]) -> list[Hashable]:
    """What is counted in a sequence: the words of a string, the values of a tensor, else the elements themselves."""
    if isinstance(units, str):
        return list(split_words(units))
    # the elements of a tensor hash by identity: as they are, no two would ever count as the same token
    return units.tolist() if hasattr(units, "tolist") else list(units)


def list_ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """The n-grams of a list in their order, overlapping ones included; none where there are fewer than `n` units."""
    return list(zip(*(units[start:] for start in range(n)), strict=False))
