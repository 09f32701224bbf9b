"""Noticing that an answer has begun to go round in circles, while it is generated, and what to do then.

A loop is a stretch of tokens that equals what stood one period earlier, save for a few changed tokens, over about three
periods. An n-gram that was seen before proposes the distance to its last place as a period; from then on each token is
compared with the one a period back, so a token costs a few dictionary look-ups and at most `_MOST` comparisons.

Much that is regular is no loop, and three things tell them apart:

- Prose never says five different words three times over; code, tables and rules of dashes do. So a period of prose is
  called a loop at its third copy, and the fewer words it has, the longer it must go on.
- A table or list differs in the same places of every row, a loop with changed tokens anywhere. So the last periods are
  laid on top of each other: a place that had something else each time is a slot with content of its own.
- Numbers that differ are data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from lory.decoding.loop import Verdict
from lory.decoding.processors import LoopEscape
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["token", "phrase", "passage", "drift"]

MAX_PERIOD = 200
NGRAM = 4
_MOST = 8
"""Periods that are followed at a time."""
_MISS = 6
"""A token that differs costs as much as this many equal ones earn: below 86% equal tokens a period is given up."""
_CREDIT = 40
"""The most that equal tokens earn."""
_FIRST_CREDIT = 12
"""What a period has at least when it is proposed, so that two changed tokens side by side don't end it."""
_MISS_BEFORE = 2
"""What a token that differs costs while the beginning is looked for; more would put it after the first change."""
_DIFFERING = 0.14
"""Tokens that may differ from those a period back: 5% changed in either copy are 10%, and their spread."""
_SLOTS = 0.02
"""Places of a period that may be slots; with 5% of changed tokens 0.75% look like one by chance."""
_NUMBERS = 1 / 3
"""Of the places that differ, those at which a number may stand in place of another."""
_RICH = 5
"""Different words, at least, in a period that is taken for a loop at its third copy."""
_PROSE_SHARE, _PROSE_SLOPE, _PROSE_LEAST = 0.45, 0.006, 0.1
"""Words after a space among a period's tokens, at least, where three copies with changes are a loop (most prose has
0.6 to 0.8, Python files 0.2); how much less for each of its tokens, since rows of tables are short; and the least."""
_CONTEXT = 64
"""Tokens among which signs of source code are counted where a period has few words."""
_EARLY = 2
"""Tokens before the end of the third copy at which it is looked at: the first token of the second may be changed."""


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


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long a loop must have gone on before it is called one: in periods and in tokens, whichever is more."""

    periods: float
    tokens: int
    periods_with_changes: float
    tokens_with_changes: int


# Chosen on 29,000 documents: source code, markup, tables, licences, articles, answers (benchmarks/guard.py measures)
_UNKNOWN = _Patience(2.9, 32, 3.0, 32)
_PROSE = _Patience(3.0, 9, 3.0, 24)
_FEW_WORDS = _Patience(3.0, 12, 3.7, 48)
_PROSE_OF_PARTS = _Patience(3.0, 9, 4.0, 120)
_PHRASES_IN_SIGNS = _Patience(3.9, 100, 4.0, 120)
_WORDS_IN_SIGNS = _Patience(3.9, 200, 4.0, 250)
# numbers that differ here and there are data
_SIGNS = _Patience(2.9, 400, 2.9, 400)


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


class _Stretch:
    """A period that is followed."""

    __slots__ = ("begin", "credit", "differing", "due", "period")

    def __init__(self, period: int, begin: int, differing: int, credit: int, due: int) -> None:
        self.period = period
        self.begin = begin  # the first token that is compared with the one a period back
        self.differing = differing
        self.credit = credit
        self.due = due  # when to look at it closely


class RepetitionGuard:
    """Watches one answer's tokens; a token costs about a microsecond.

    Args:
        substance: what a token says, as `Words` has it; without it each token counts as a word, and tables and rules of
            dashes raise false alarms.
        max_period: the longest period that is looked for, in tokens.

    After an alarm it looks for a new loop: one that goes on is reported again when it has gone on as long once more.
    """

    def __init__(self, substance: Callable[[int], Substance] | None = None, max_period: int = MAX_PERIOD) -> None:
        if max_period < 1:
            raise UsageError(f"max_period = {max_period} was given to the repetition guard; give 1 or more tokens.")
        self.max_period = max_period
        self._substance = substance
        self._ids: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
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
        for stretch in self._followed:
            if token == ids[place - stretch.period]:
                if stretch.credit < _CREDIT:
                    stretch.credit += 1
            else:
                stretch.differing += 1
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
            ngram = tuple(ids[-NGRAM:])
            before = self._last.get(ngram)
            self._last[ngram] = place
            if before is not None and before >= self._floor and place - before <= self.max_period:
                self._follow(place - before)
        return None

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; what looped before is not held against what comes now."""
        ids, self._ids, self._last, self._followed = self._ids[:length], [], {}, []
        self._floor = length
        for token in ids:
            self._ids.append(token)
            if len(self._ids) >= NGRAM:
                self._last[tuple(self._ids[-NGRAM:])] = len(self._ids) - 1

    def _follow(self, period: int) -> None:
        if any(stretch.period == period for stretch in self._followed):
            return
        ids, place = self._ids, len(self._ids) - 1
        # how far back it holds already: where an earlier n-gram had repeated something nearer, it was not proposed
        begin, differing, seen, score, best = place, 0, 0, 0, 0
        lowest = max(self._floor + period, place - 2 * self.max_period)
        for earlier in range(place, lowest - 1, -1):
            if ids[earlier] == ids[earlier - period]:
                score += 1
                if score >= best:
                    best, begin, differing = score, earlier, seen
            else:
                score -= _MISS_BEFORE
                seen += 1
                if score < best - _MISS * _MISS_BEFORE:
                    break
        credit = max(_FIRST_CREDIT, min(_CREDIT, place - begin + 1 - differing * (_MISS + 1)))
        due = begin - period + max(3 * period - _EARLY, _PROSE.tokens) - 1
        if len(self._followed) >= _MOST:
            self._followed.remove(min(self._followed, key=lambda stretch: stretch.credit))
        self._followed.append(_Stretch(period, begin, differing, credit, max(place, due)))

    def _examine(self, stretch: _Stretch) -> Loop | None:
        """Whether a stretch is a loop by now; if not, when to look again (at least a quarter of a period later)."""
        place, period = len(self._ids) - 1, stretch.period
        compared = place - stretch.begin + 1
        patience = self._choose_patience(period)
        needed = max(math.ceil(patience.periods * period) - _EARLY, patience.tokens)
        if stretch.differing:
            least = math.ceil(patience.periods_with_changes * period) - _EARLY
            needed = max(needed, least, patience.tokens_with_changes)
        if compared + period < needed:
            stretch.due = stretch.begin - period + needed - 1
            return None
        if stretch.differing and (
            stretch.differing > _DIFFERING * compared
            or patience is _SIGNS
            or self._is_table(period, copies=3 if patience.periods_with_changes <= 3 else 4)
        ):
            stretch.due = place + max(period // 4, 8)
            return None
        kind: Kind = "token" if period == 1 else "phrase" if period <= 8 else "passage"
        return Loop(
            start=stretch.begin - period,
            period=period,
            repeats=(compared + period) / period,
            kind="drift" if stretch.differing else kind,
            changed=stretch.differing / compared,
        )

    def _choose_patience(self, period: int) -> _Patience:
        if self._substance is None:
            return _PROSE if len(set(self._ids[-period:])) >= _RICH else _UNKNOWN
        ids = self._ids[-period:]
        substances = [self._substance(token) for token in ids]
        distinct = dict(zip(ids, substances, strict=True)).values()
        words = sum(substance >= Substance.PART for substance in distinct)
        content = words + sum(substance == Substance.BYTES for substance in distinct) / 2
        # without spaces before them, words are names in code
        prose = sum(substance in (Substance.WORD, Substance.BYTES) for substance in substances) / period
        code = substances.count(Substance.CODE) / period
        if content >= _RICH:
            if code <= 0.1 and prose >= max(_PROSE_SHARE - _PROSE_SLOPE * period, _PROSE_LEAST):
                return _PROSE
            if (code <= 0.15 and prose >= 0.2) or period >= 40:
                return _PROSE_OF_PARTS
        elif prose >= 0.3 and sum(substance >= Substance.BYTES for substance in substances) >= 0.6 * period:
            # a few words say little about the text that they stand in
            around = [self._substance(token) for token in self._ids[-_CONTEXT:]]
            # and a run of one emoji is three tokens of bytes
            if around.count(Substance.CODE) <= 0.1 * len(around) and (words or content >= 2):
                return _FEW_WORDS if words else _UNKNOWN
        return _PHRASES_IN_SIGNS if content >= 4 else _WORDS_IN_SIGNS if content else _SIGNS

    def _is_table(self, period: int, copies: int) -> bool:
        """Whether the last three or four copies differ as rows of a table do: at the same places, or in numbers.

        Of the tokens w, x, y, z at one place in four copies, a loop has one changed (w x w w), or a change that stays
        (w w y y); a slot with content of its own has more. Of three copies, a slot has x, y and z all different; where
        a share r of a loop's tokens was changed, that comes at 3 r^2 of the places, and one odd token at 3 r of them.
        """
        ids, number = self._ids, self._is_number
        slots = odd = numbers = 0
        for place in range(len(ids) - period, len(ids)):
            z, y = ids[place], ids[place - period]
            x = ids[place - 2 * period] if place >= 2 * period else y
            if z == y == x:
                continue
            w = ids[place - 3 * period] if place >= 3 * period else x
            numbers += (number(y) and number(z)) or (number(x) and number(y))
            slots += (y not in (x, z) and x != z) if copies == 3 else _changes_often(w, x, y, z)
            odd += 1
        if numbers > _NUMBERS * odd:
            return True
        return slots > (max(1, _SLOTS * period) if copies == 3 else 0.75 * _SLOTS * period) or odd < 3 * slots

    def _is_number(self, token: int) -> bool:
        return self._substance is not None and self._substance(token) == Substance.NUMBER


def _changes_often(w: int, x: int, y: int, z: int) -> bool:
    """Whether a place had more than one changed token, or one change that stays, in four copies."""
    alone = (z == y == w) or (z == x == w)
    return (z != y) + (y != x) + (x != w) > 1 and not alone


Policy = Literal["report", "stop", "penalize", "back_up", "retry"]


class PolicyGuard:
    """Watches the rows of a decode loop (it is a `loop.Watcher`) and acts by a policy; one for each call of the loop.

    Args:
        policy: `report` only notes loops; `stop` ends the answer; `penalize` makes the loop's tokens less likely from
            then on, more so each time; `back_up` returns to the end of the first copy, forbids the token that led into
            the second, and samples for a while (one row at a time); `retry` ends the answer, too, and `outcomes` asks
            the caller for another attempt with a changed prompt.
        prompt_tokens: columns of the ids that are the prompt's.
        substance: see `RepetitionGuard`.
        terminators: tokens that end an answer; what follows in its row is padding.
        limit: how many times an answer is helped before it is stopped.
        seed: for what `back_up` samples.

    Attributes:
        loops: by row, those found, in order, counted from the answer's first token.
        outcomes: by row, why it was ended here: the finish reason.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_tokens: int,
        substance: Callable[[int], Substance] | None = None,
        terminators: Collection[int] = (),
        limit: int = 3,
        seed: int = 0,
    ) -> None:
        self.policy, self.limit, self.seed = policy, limit, seed
        self.loops: dict[int, list[Loop]] = {}
        self.outcomes: dict[int, Literal["repetition", "retry"]] = {}
        self._prompt_tokens = self._seen = prompt_tokens
        self._substance, self._terminators = substance, frozenset(terminators)
        self._guards: list[RepetitionGuard] = []
        self._escape: LoopEscape | None = None
        self._ended: set[int] = set()

    def __call__(self, ids: Tensor, scores: Tensor) -> Verdict | None:
        """Judge (B, T) prompt and answer so far, and the (B, V) processed scores of the next token; None: go on."""
        if not self._guards:
            self._begin(len(ids))
        back = 0
        for row, tokens in enumerate(ids[:, self._seen :].tolist()):
            for token in tokens:
                back = self._take(row, token, ids) or back
        self._seen = ids.shape[1] - back
        if back:
            return Verdict(back=back)
        stop = torch.tensor([row in self.outcomes for row in range(len(ids))], device=ids.device)
        changed = self._escape(ids, scores) if self._escape else scores
        if changed is scores and not self.outcomes:
            return None
        return Verdict(scores=changed, stop=stop)

    def _begin(self, rows: int) -> None:
        if self.policy == "back_up" and rows != 1:
            raise UsageError(
                f"The guard's policy back_up was given for {rows} answers at a time; decode them one by one, "
                "or choose penalize."
            )
        self._guards = [RepetitionGuard(self._substance) for _ in range(rows)]
        if self.policy in ("penalize", "back_up"):
            self._escape = LoopEscape(rows, self.seed)

    def _take(self, row: int, token: int, ids: Tensor) -> int:
        """Feed a row's new token and act on the loop that shows; how many tokens are to be taken back."""
        if row in self._ended:
            return 0
        if token in self._terminators:
            self._ended.add(row)
        if self._escape:
            self._escape.move_on(row)
        loop = self._guards[row].feed(token)
        if loop is None:
            return 0
        loops = self.loops.setdefault(row, [])
        loops.append(loop)
        copy_end = loop.start + loop.period
        answer = ids[row, self._prompt_tokens :].tolist()
        if self.policy == "retry" or (self.policy != "report" and (not self._escape or len(loops) > self.limit)):
            self.outcomes[row] = "retry" if self.policy == "retry" else "repetition"
            self._ended.add(row)
        elif self._escape and self.policy == "penalize":
            self._escape.penalize(row, answer[loop.start : copy_end])
        elif self._escape:
            self._escape.lead_out(row, answer[copy_end])
            self._guards[row].rewind(copy_end)
            return len(answer) - copy_end
        return 0


class RepetitionStop(StoppingCriteria):
    """Ends a row of transformers' `generate` when it loops.

    Args:
        prompt_tokens: columns of `input_ids` that belong to the prompt.
        substance: see `RepetitionGuard`.

    Attributes:
        loops: by row, the loop that ended it.
    """

    def __init__(self, prompt_tokens: int, substance: Callable[[int], Substance] | None = None) -> None:
        self.loops: dict[int, Loop] = {}
        self._seen = prompt_tokens
        self._substance = substance
        self._guards: list[RepetitionGuard] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) whether each row is done; `input_ids` are (B, T)."""
        if not self._guards:
            self._guards = [RepetitionGuard(self._substance) for _ in range(len(input_ids))]
        for row, tokens in enumerate(input_ids[:, self._seen :].tolist()):
            if row not in self.loops and (loop := find_loop(tokens, self._guards[row])):
                self.loops[row] = loop
        self._seen = input_ids.shape[1]
        done = [row in self.loops for row in range(len(input_ids))]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def find_loop(tokens: Iterable[int], guard: RepetitionGuard) -> Loop | None:
    """Feed `tokens` to the guard up to the first alarm."""
    return next((loop for token in tokens if (loop := guard.feed(token))), None)
