"""Taking out of a finished text what it says again and again, and leaving what differs.

Three kinds go: a phrase said at least three times in a row, a run of sentences said twice or more in a row, and a long
sentence that stood in the text before. Code, tables and formulas stay as they are; so do lists and verses, whose lines
may come again (a refrain), unless one line or stanza comes three times on end.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# Where a sentence ends: its signs and what closes after them. A full stop needs a space or the end behind it, else it
# may be a decimal point; the Chinese and Japanese signs need nothing.
_CLOSING = "\"'”’)\\]»」』）】》*_"
_SENTENCE = re.compile(rf".+?(?:[.!?…]+[{_CLOSING}]*(?=\s|$)|[。！？；｡؟।]+[{_CLOSING}]*|$)", re.DOTALL)
# Scripts that are written without spaces: a word is a character
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LETTER = rf"(?:(?!{_UNSPACED.pattern})[^\W_])"
_PIECE = re.compile(rf"{_UNSPACED.pattern}|{_LETTER}+(?:['’-]{_LETTER}+)*")
# What opens code or a formula that goes on over lines, and what closes it
_FENCES = {"```": "```", "~~~": "~~~", "$$": "$$", "\\[": "\\]", "\\begin": "\\end"}
_KEPT_LINE = re.compile(r"^\s*\||^(?: {4}|\t)")
_LIST_LINE = re.compile(r"^\s*(?:[-*+•·]|\(?[\w一二三四五六七八九十]{1,3}[.)、）])\s*\S")

# A long sentence is no figure of speech: said again anywhere, it goes
_LONG_SENTENCE = 6
# "No. No." is an answer, this many words said twice are not
_SENTENCE_AGAIN = 3
# "very very very" is emphasis, and so is 哈哈哈哈
_TIMES_WORD, _TIMES_CHARACTER, _TIMES_PHRASE = 4, 6, 3
_LONGEST_PHRASE = 40
_LONGEST_RUN = 20
_VERSE_WIDTH = 60


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the original text, from `start` up to `end`, in characters."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """A text without its repetitions.

    Attributes:
        text: what is left.
        removed: what was taken out, in order, as places in the original text.
    """

    text: str
    removed: list[Span]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A sentence, line or word: its place, and what it is compared by."""

    start: int
    end: int
    key: tuple[str, ...]


def repair(text: str) -> Repaired:
    """Take repeated sentences and phrases out of `text`; a text without any comes back as it is."""
    spans: list[Span] = []
    seen: set[tuple[str, ...]] = set()
    for block in _split_blocks(text):
        kind = _recognise(text, block)
        spans += _repair_prose(text, block, seen) if kind == "prose" else _repair_lines(block)
        if kind == "list":
            # items may come again elsewhere, but each is prose in itself
            for item in block:
                spans += _repair_prose(text, [item], set())
    merged = _merge(spans)
    pieces, end = [], 0
    for span in merged:
        pieces.append(text[end : span.start])
        end = span.end
    pieces.append(text[end:])
    repaired = "".join(pieces)
    if merged and merged[-1].end == len(text):
        # the space before a repetition that was cut off by the end
        repaired = repaired.rstrip()
    return Repaired(repaired, merged)


def _make_unit(text: str, start: int, end: int) -> _Unit:
    return _Unit(start, end, tuple(_fold(match.group()) for match in _PIECE.finditer(text, start, end)))


def _fold(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()


def _split_blocks(text: str) -> Iterator[list[_Unit]]:
    """The lines of each stretch without empty lines, but for what is to stay as it is: code, tables, formulas."""
    block: list[_Unit] = []
    closing = ""
    place = 0
    for line in text.splitlines(keepends=True):
        unit = _make_unit(text, place, place + len(line))
        place += len(line)
        stripped = line.strip()
        opening = next((mark for mark in _FENCES if stripped.startswith(mark)), "")
        if closing:
            closing = "" if closing in stripped else closing
        elif opening:
            closing = _FENCES[opening]
            if closing in stripped[len(opening) :]:
                closing = ""
        elif stripped and not _KEPT_LINE.match(line):
            block.append(unit)
            continue
        if block:
            yield block
            block = []
    if block:
        yield block


def _recognise(text: str, block: Sequence[_Unit]) -> Literal["prose", "list", "verse"]:
    """What a block is; in lists and verse, lines may come again."""
    lines = [text[unit.start : unit.end].rstrip() for unit in block]
    if any(_LIST_LINE.match(line) for line in lines):
        return "list"
    ended = sum(bool(re.search(rf"[.!?…。！？][{_CLOSING}]*$", line)) for line in lines)
    short = max(map(len, lines)) <= _VERSE_WIDTH
    return "verse" if len(lines) > 1 and short and 2 * ended <= len(lines) else "prose"


def _repair_lines(block: Sequence[_Unit]) -> list[Span]:
    """In lists and verse, only what comes three times on end is too much."""
    return [
        Span(block[first].start, block[last - 1].end)
        for first, last in _find_runs(block, _LONGEST_RUN, lambda run: 3 if any(unit.key for unit in run) else 0)
    ]


def _repair_prose(text: str, block: Sequence[_Unit], seen: set[tuple[str, ...]]) -> list[Span]:
    start, end = block[0].start, block[-1].end
    sentences = [
        _make_unit(text, match.end() - len(match.group().lstrip()), match.start() + len(match.group().rstrip()))
        for match in _SENTENCE.finditer(text, start, end)
        if match.group().strip()
    ]
    gone: set[int] = set()
    for first, last in _find_runs(
        sentences, _LONGEST_RUN, lambda run: 2 if sum(len(unit.key) for unit in run) >= _SENTENCE_AGAIN else 0
    ):
        gone.update(range(first, last))
    for place, sentence in enumerate(sentences):
        if len(sentence.key) >= _LONG_SENTENCE and place not in gone:
            if sentence.key in seen:
                gone.add(place)
            seen.add(sentence.key)
    if sentences and _is_cut_off(text, sentences, gone, seen):
        gone.add(len(sentences) - 1)
    spans = []
    last_kept = max((place for place in range(len(sentences)) if place not in gone), default=-1)
    for place in sorted(gone):
        if place < last_kept:
            spans.append(Span(sentences[place].start, sentences[place + 1].start))
        elif last_kept >= 0:
            # the space before it goes; the end of the line stays
            spans.append(Span(sentences[place - 1].end, sentences[place].end))
        else:
            spans.append(Span(start, end))
    for place, sentence in enumerate(sentences):
        if place not in gone:
            spans += _repair_phrases(text, sentence)
    return spans


def _is_cut_off(text: str, sentences: Sequence[_Unit], gone: set[int], seen: set[tuple[str, ...]]) -> bool:
    """Whether the text breaks off in the middle of one more copy of what has just been taken out."""
    last, place = sentences[-1], len(sentences) - 1
    at_end = not text[last.end :].strip() and not re.search(rf"[.!?…。！？][{_CLOSING}]*\s*$", text[: last.end])
    if not at_end or place - 1 not in gone or not last.key:
        return False
    known = seen | {sentence.key for sentence in sentences[:place]}
    # the last word may be broken off, too
    head = last.key[:-1]
    return any(key[: len(head)] == head and "".join(key).startswith("".join(last.key)) for key in known)


def _repair_phrases(text: str, sentence: _Unit) -> list[Span]:
    words = [
        _Unit(match.start(), match.end(), (_fold(match.group()),))
        for match in _PIECE.finditer(text, sentence.start, sentence.end)
    ]

    def times(run: Sequence[_Unit]) -> int:
        if not any(character.isalpha() for unit in run for character in unit.key[0]):
            return 0  # numbers may repeat
        if len({unit.key for unit in run}) > 1:
            return _TIMES_PHRASE
        return _TIMES_CHARACTER if _UNSPACED.match(run[0].key[0]) else _TIMES_WORD

    # from the end of the first copy to the end of the last: what follows keeps its own comma or full stop
    return [
        Span(words[first - 1].end, words[last - 1].end) for first, last in _find_runs(words, _LONGEST_PHRASE, times)
    ]


def _find_runs(units: Sequence[_Unit], longest: int, times: Callable[[Sequence[_Unit]], int]) -> list[tuple[int, int]]:
    """Where units repeat without a break: (first, last) of the copies after the first one.

    Args:
        longest: units in a copy, at most; shorter copies are found first.
        times: how often a copy must come to be too much; 0: never.
    """
    keys = [unit.key for unit in units]
    taken = [False] * len(units)
    runs = []
    for period in range(1, min(longest, len(units) // 2) + 1):
        place = 0
        while place + period < len(units):
            end = place
            while end + period < len(units) and keys[end] == keys[end + period]:
                end += 1
            copies = (end - place) // period + 1
            last = place + copies * period
            needed = times(units[place : place + period]) if copies > 1 else 0
            if needed and copies >= needed and not any(taken[place:last]):
                runs.append((place + period, last))
                taken[place:last] = [True] * (last - place)
            # the next run cannot begin before the last `period` units of this one
            place = max(place + 1, end)
    return runs


def _merge(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        elif span.end > span.start:
            merged.append(span)
    return merged
