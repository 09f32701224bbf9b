"""Noticing that an answer has begun to go round in circles, while it is generated.

A loop is a stretch of tokens that equals what stood one period earlier, save for a few changed tokens, over about three
periods. An n-gram that was seen before proposes the distance to its last place as a period (three tokens up to a period
of `_FEW`, four beyond, three equal ones for a period of one); from then on each token is compared with the one a period
back, so a token costs a few dictionary look-ups and at most `_MOST` comparisons.

Much that is regular is no loop, and three things tell them apart:

- Prose says nothing three times over; code, tables and rules of dashes do. So what reads like prose is called a loop at
  its third copy, and anything else has to go on for longer, the less it says the longer.
- A table or list differs in the same places of every row, a loop with changed tokens anywhere. So the last periods are
  laid on top of each other, and the places that had something else each time are counted against what chance explains.
- Numbers that differ are data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lory.decoding.words import Substance, Words
from lory.runtime import UsageError

Kind = Literal["token", "phrase", "passage", "drift"]

MAX_PERIOD = 200
NGRAM = 4
_FEW = 8
"""Up to this period an n-gram less its first token is enough: one changed token leaves few that are there twice."""
_MOST = 8
"""Periods that are followed at a time."""
_MISS = 5
"""A token that differs costs as much as this many equal ones earn: below 83% equal tokens a period is given up."""
_CREDIT = 40
"""The most that equal tokens earn."""
_FIRST_CREDIT = 16
"""What a period has at least when it is proposed, so that changed tokens side by side don't end it."""
_MISS_BEFORE = 2
"""What a token that differs costs while the beginning is looked for; more would put it after the first change."""
_DIFFERING, _SPREAD = 0.1, 0.6
"""Tokens that may differ from those a period back: 5% changed in either copy are 10%, and their spread, which goes with
one over the root of how many are compared."""
_NUMBERS = 1 / 3
"""Of the places that differ, those at which a number may stand in place of another."""
_CONTEXT = 256
"""Tokens by which it is judged whether the text around a loop is prose."""
_LONG, _LONGEST = 40, 80  # tokens of a long period, and of one that hardly ever comes again in code
_PROSE_LEAST, _PROSE_LEAST_LONG, _PROSE_SURE = 0.3, 0.05, 0.4
"""Words after a space less signs of code, of all tokens, at least in prose (most has 0.6 to 0.8): the first figure for
short periods, down to the second for the longest. Below the third a phrase with changes may be names in code."""
_EARLY, _EARLY_SHARE = 2, 0.1
"""Tokens before the end of the third copy, and share of a period if that is more, at which it is looked at: the first
tokens of the second may be changed."""
_VARIED, _VARIED_SHARE = 32, 0.6
"""Tokens before a word said three times, and the share of them that has to be different: in a list of few values a
word stands there three times by chance."""


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long a loop must have gone on before it is called one: in periods and in tokens, whichever is more."""

    periods: float
    tokens: int
    periods_with_changes: float
    tokens_with_changes: int
    caution: float
    """Times one over the period, the least probability that a loop's changed tokens fall on as many places twice as
    they did; see `_is_table`."""


_NEVER = 10**9
# Chosen on 50,000 documents: source code, markup, tables, licences, articles, answers (benchmarks/guard.py measures)
_PASSAGE = _Patience(3, 9, 3, 24, 0.33)
_SENTENCE = _Patience(3, 9, 3, 24, 0.6)
_CLAUSE = _Patience(3, 9, 3, 24, 2)
_PHRASE = _Patience(3, 9, 3, 12, 10)
_PHRASE_IN_DOUBT = _Patience(3, 9, 3, 48, 10)
_TWO_WORDS = _Patience(3, 6, 3, 48, 3)
_LONG_WORD = _Patience(3, 3, 3, 48, 3)
_PHRASE_WITH_SIGNS = _Patience(3, 24, 3, 32, 10)
_WORD_AGAIN = _Patience(3, 12, 3, 48, 3)
_UNKNOWN = _Patience(3, 32, 3, 32, 3)
_CHARACTERS = _Patience(3, 20, 4, 120, 10)
_PASSAGE_IN_SIGNS = _Patience(3, 120, 5, 200, 16)
_PHRASE_IN_SIGNS = _Patience(4, 150, 6, 200, 40)
_WORDS_IN_SIGNS = _Patience(4, 300, 6, 300, 40)
# numbers that differ here and there are data
_ROWS_OF_SIGNS = _Patience(3, 150, 3, _NEVER, 0)
_SIGNS = _Patience(3, 450, 3, _NEVER, 0)


@dataclass(frozen=True, slots=True)
class Loop:
    """A stretch that repeats itself, up to the token that was fed last.

    Attributes:
        start: the place of its first token among those fed; the first copy goes up to ``start + period``.
        period: tokens of one copy.
        repeats: copies so far, with fractions.
        kind: `token` (one token), `phrase` (up to 8), `passage` (longer), or `drift` (any, with some tokens changed).
        changed: the share of tokens that differ from those a period back.
    """

    start: int
    period: int
    repeats: float
    kind: Kind
    changed: float = 0.0


class _Stretch:
    """A period that is followed."""

    __slots__ = ("begin", "credit", "differing", "doubts", "due", "exact", "period")

    def __init__(self, period: int, begin: int, exact: int, differing: int, credit: int, due: int) -> None:
        self.period = period
        self.begin = begin  # the first token that is compared with the one a period back
        self.exact = exact  # the first after the last that differed
        self.differing = differing
        self.credit = credit
        self.doubts = 0  # how often it was taken for a table
        self.due = due  # when to look at it closely


class RepetitionGuard:
    """Watches one answer's tokens; a token costs about a microsecond.

    Args:
        substance: what a token says; without it each token counts as a word, and tables and rules of
            dashes raise false alarms.
        max_period: the longest period that is looked for, in tokens.

    After an alarm it looks for a new loop: one that goes on is reported again when it has gone on as long once more.
    """

    def __init__(self, substance: Words | None = None, max_period: int = MAX_PERIOD) -> None:
        if max_period < 1:
            raise UsageError(f"max_period = {max_period} was given to the repetition guard; give 1 or more tokens.")
        self.max_period = max_period
        self._substance = substance
        self._ids: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
        self._prose = [0]  # by place: words after a space less signs of code before it; made when it is asked for
        self._followed: list[_Stretch] = []
        self._floor = 0  # what stands before it was part of an alarm

    def __len__(self) -> int:
        return len(self._ids)

    def feed(self, token: int) -> Loop | None:
        """Take the next token; the loop that has become certain with it, if any."""
        ids = self._ids
        ids.append(token)
        place = len(ids) - 1
        lost = False
        if place >= self._floor + 2 and token == ids[-2] == ids[-3]:
            self._follow(1)
        for stretch in self._followed:
            if token == ids[place - stretch.period]:
                if stretch.credit < _CREDIT:
                    stretch.credit += 1
            else:
                stretch.differing += 1
                stretch.exact = place + 1
                stretch.credit -= _MISS
                if stretch.credit < 0:
                    lost = True
                    continue
            if place >= stretch.due and (loop := self._examine(stretch)):
                self._followed, self._floor = [], place + 1
                return loop
        if lost:
            self._followed = [stretch for stretch in self._followed if stretch.credit >= 0]
        if place >= NGRAM - 1:
            ngram = tuple(ids[1 - NGRAM :])
            before = self._last.get(ngram)
            self._last[ngram] = place
            longest = self.max_period if before and ids[before - NGRAM + 1] == ids[-NGRAM] else _FEW
            if before is not None and before >= self._floor and place - before <= min(longest, self.max_period):
                self._follow(place - before)
        return None

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; what looped before is not held against what comes now."""
        ids, self._ids, self._last, self._followed = self._ids[:length], [], {}, []
        del self._prose[length + 1 :]
        self._floor = length
        for token in ids:
            self._ids.append(token)
            if len(self._ids) >= NGRAM:
                self._last[tuple(self._ids[1 - NGRAM :])] = len(self._ids) - 1

    def _follow(self, period: int) -> None:
        if any(stretch.period == period for stretch in self._followed):
            return
        ids, place = self._ids, len(self._ids) - 1
        # how far back it holds already: where an earlier n-gram had repeated something nearer, it was not proposed
        begin, exact, differing, seen, score, best = place, 0, 0, 0, 0, 0
        lowest = max(self._floor + period, place - 2 * self.max_period)
        for earlier in range(place, lowest - 1, -1):
            if ids[earlier] == ids[earlier - period]:
                score += 1
                # one less: a changed token among the first few is still behind the beginning
                if score >= best - 1:
                    best, begin, differing = max(score, best), earlier, seen
            else:
                exact = exact or earlier + 1
                score -= _MISS_BEFORE
                seen += 1
                if score < best - _MISS * _MISS_BEFORE:
                    break
        credit = max(_FIRST_CREDIT, min(_CREDIT, place - begin + 1 - differing * (_MISS + 1)))
        # early, since the beginning may turn out to be before a change
        due = begin - period + max(_count_tokens(2.9, period), min(3 * period, 6)) - 1
        if len(self._followed) >= _MOST:
            self._followed.remove(min(self._followed, key=lambda stretch: stretch.credit))
        self._followed.append(_Stretch(period, begin, exact or begin, differing, credit, max(place, due)))

    def _examine(self, stretch: _Stretch) -> Loop | None:
        """Whether a stretch is a loop by now; if not, when to look again."""
        self._extend(stretch)
        place, period = len(self._ids) - 1, stretch.period
        compared = place - stretch.begin + 1
        patience = self._choose_patience(period)
        exact = place - stretch.exact + 1 + period
        needed = max(_count_tokens(patience.periods, period), patience.tokens)
        if exact >= needed:
            kind: Kind = "token" if period == 1 else "phrase" if period <= 8 else "passage"
            return Loop(stretch.exact - period, period, exact / period, kind)
        needed_with_changes = max(_count_tokens(patience.periods_with_changes, period), patience.tokens_with_changes)
        # by then more of what stands around it is the loop itself
        stretch.due = place + min(needed - exact, max(period, 8))
        if compared + period < needed_with_changes:
            stretch.due = min(stretch.due, stretch.begin - period + needed_with_changes - 1)
            return None
        if self._ids[place] not in (self._ids[place - period], self._ids[place - 2 * period]):
            # what leaves the period, as a row of a table does where words of other lengths fill it, is no loop
            stretch.due = place + 1
            return None
        most = _DIFFERING * compared + _SPREAD * math.sqrt(compared)
        chance = min(1.0, patience.caution * (1 + stretch.doubts) / period)
        if stretch.differing > most or self._is_table(stretch, chance):
            # it can be told better at the end of the third copy, and from then on with one copy more
            third = stretch.begin + 2 * period - 1
            if place < third:
                stretch.due = min(stretch.due, max(place + 1, third - 1))
            else:
                stretch.doubts += 1
            return None
        repeats, changed = (compared + period) / period, stretch.differing / compared
        return Loop(stretch.begin - period, period, repeats, "drift", changed)

    def _extend(self, stretch: _Stretch) -> None:
        """Move the beginning back over tokens that were changed in the second copy only: the third has them again."""
        ids, period = self._ids, stretch.period
        while (start := stretch.begin - period) > self._floor and ids[start - 1] == ids[start - 1 + 2 * period]:
            stretch.begin -= 1
            stretch.differing += ids[stretch.begin] != ids[start - 1]

    def _choose_patience(self, period: int) -> _Patience:
        if self._substance is None:
            return _choose_in_prose(period) if len(set(self._ids[-period:])) >= 5 else _UNKNOWN
        distinct = [self._substance(token) for token in set(self._ids[-period:])]
        words = sum(substance >= Substance.PART for substance in distinct)
        content = words + distinct.count(Substance.BYTES) / 2
        prose = self._weigh_prose(period) if content else 0.0
        if prose > max(_PROSE_LEAST_LONG, _PROSE_LEAST * (1 - period / _LONGEST)):
            if period < 3 or not words:
                return self._choose_for_letters(period, words)
            if period < 10 and any(self._substance(token) == Substance.CODE for token in self._ids[-2 * period :]):
                return _PHRASE_WITH_SIGNS
            # every other token a comma: a list of few values has much that repeats itself by chance
            listed = 2 * (words + distinct.count(Substance.BYTES)) <= period
            return _choose_in_prose(period, prose < _PROSE_SURE or listed)
        if period >= _LONG and len(distinct) >= 10:
            return _PASSAGE_IN_SIGNS if content >= 5 else _ROWS_OF_SIGNS
        return _PHRASE_IN_SIGNS if content >= 4 else _WORDS_IN_SIGNS if content else _SIGNS

    def _choose_for_letters(self, period: int, words: int) -> _Patience:
        """For one or two words, or characters of several tokens each: which of the two is told by their letters."""
        assert self._substance is not None
        copies = self._ids[-2 * period :], self._ids[-3 * period : -period]
        letters = min(map(self._substance.weigh_letters, copies))
        if words and period == 1:
            return _LONG_WORD if letters >= 6 and self._is_unexpected() else _WORD_AGAIN
        if words:
            return _TWO_WORDS if words == period and letters >= 5 else _WORD_AGAIN
        # a character has three tokens at most; lines and rows of pictures have no letters
        if letters >= 6 or (letters and period > 3):
            return _choose_in_prose(period)
        return _CHARACTERS if letters else _WORDS_IN_SIGNS

    def _is_unexpected(self) -> bool:
        """Whether the last token, there three times, is new in a text that says something else all the time."""
        assert self._substance is not None
        before, token = self._ids[-_CONTEXT:-3], self._ids[-1]
        around = before[-_VARIED:]
        varied = len(around) == _VARIED and len(set(around)) >= _VARIED_SHARE * _VARIED
        return varied and token not in before and self._substance(token) == Substance.WORD

    def _weigh_prose(self, period: int) -> float:
        """Words less signs of code among the tokens of the last period and of what stands around it."""
        assert self._substance is not None
        sums = self._prose
        for token in self._ids[len(sums) - 1 :]:
            substance = self._substance(token)
            # without spaces before them, words are names in code
            sums.append(sums[-1] + (substance in (Substance.WORD, Substance.BYTES)) - (substance == Substance.CODE))
        around = min(_CONTEXT, len(self._ids))
        in_context, in_period = (sums[-1] - sums[-1 - around]) / around, (sums[-1] - sums[-1 - period]) / period
        # the few tokens of a period may by chance have few words; where all are words, what stands around matters less
        return max(min(in_context, in_period + 0.1), in_period - 0.5)

    def _is_table(self, stretch: _Stretch, chance: float) -> bool:
        """Whether the last copies differ as rows of a table do: at the same places, or in numbers.

        Changed tokens of a loop may be anywhere. If three copies of p tokens have n changed ones, n^2 / 2 pairs of
        them fall on the same place of two different copies with a probability of 2 / 3p each, so that about n^2 / 3p
        places are "slots", which have something else in each copy; of four copies, 3 m^2 / 8p have two changed ones,
        where m is 4/3 n. Rows of a table have far more: then the Poisson probability of so many is below `chance`.
        """
        ids, number, period, start = self._ids, self._is_number, stretch.period, stretch.begin - stretch.period
        slots = twice = odd = numbers = changes = last = 0
        for place in range(len(ids) - period, len(ids)):
            z, y = ids[place], ids[place - period]
            # the third copy may not be there yet, and may differ as well
            third = place - 2 * period >= start
            x = ids[place - 2 * period] if third else y
            w = ids[place - 3 * period] if place - 3 * period >= start else x
            twice += _changes_often(w, x, y, z) if third else z != y
            if z == y == x:
                continue
            numbers += (z != y and number(y) and number(z)) or (y != x and number(x) and number(y))
            slots += (x != y and y != z and x != z) or not third
            odd += 1
            # tokens side by side are one change: those of a word that stands in a row of a table would look like chance
            changes += last < place - 1
            last = place
        if numbers > _NUMBERS * odd:
            return True
        expected = changes * changes / (3 * period)
        return not (_is_likely(slots, expected, chance) and _is_likely(twice, 2 * expected, chance))

    def _is_number(self, token: int) -> bool:
        return self._substance is not None and self._substance(token) == Substance.NUMBER


def _choose_in_prose(period: int, in_doubt: bool = False) -> _Patience:
    if period < 3:
        return _WORD_AGAIN
    if period < 20:
        return _PHRASE_IN_DOUBT if in_doubt else _PHRASE if period < 10 else _CLAUSE
    return _SENTENCE if period < _LONG else _PASSAGE


def _count_tokens(periods: float, period: int) -> int:
    """The tokens that so many periods have, less a few that may be missed at the beginning."""
    return math.ceil(periods * period - max(_EARLY, _EARLY_SHARE * period))


def _is_likely(count: int, expected: float, chance: float) -> bool:
    """Whether the Poisson probability of `count` or more is at least `chance`."""
    term = math.exp(-expected)
    fewer = 0.0
    for number in range(count):
        fewer += term
        term *= expected / (number + 1)
    return 1 - fewer >= chance


def _changes_often(w: int, x: int, y: int, z: int) -> bool:
    """Whether a place had more than one changed token, or one change that stays, in four copies."""
    alone = (z == y == w) or (z == x == w)
    return (z != y) + (y != x) + (x != w) > 1 and not alone


def find_loop(tokens: Iterable[int], guard: RepetitionGuard) -> Loop | None:
    """Feed `tokens` to the guard up to the first alarm."""
    return next((loop for token in tokens if (loop := guard.feed(token))), None)
