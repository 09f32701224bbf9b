"""Noticing that an answer has begun to go round in circles, while it is generated, and what to do then.

A loop is a stretch of tokens that equals what stood one period earlier, save for a few changed tokens, over about three
periods. An n-gram that was seen before proposes the distance to its last place as a period; from then on each token is
compared with the one a period back, so a token costs a few dictionary look-ups and at most `_MOST` comparisons.

Much that is regular is no loop, and two things tell them apart:

- A table or list differs in the same places of every row. When tokens differ, the last four periods are laid on top of
  each other: a place that changed more than once is a slot with content of its own, and loops have next to none.
- Digits, rules of dashes and zeros repeat in honest documents, words far less; so the fewer words a period has, the
  longer it must go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
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
Substance = Literal[0, 1, 2]

MAX_PERIOD = 200
NGRAM = 4
_MOST = 8
"""Periods that are followed at a time."""
_MISS = 6
"""A token that differs costs as much as this many equal ones earn: below 86% equal tokens a period is given up."""
_CREDIT = 40
"""The most that equal tokens earn."""
_DIFFERING = 0.14
"""Tokens that may differ from those a period back: 5% changed in either copy are 10%, and their spread."""
_SLOTS = 0.015
"""Places of a period that may have changed more than once among four copies; 5% of changed tokens give 1.4%."""


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long a loop must have gone on before it is called one: in periods and in tokens, whichever is more."""

    periods: float
    tokens: int
    periods_with_changes: float
    tokens_with_changes: int


# From measurements on 5,000 files: source code, markup, tables, licences, articles and answers (benchmarks/guard.py)
_PROSE = _Patience(2.9, 32, 3.7, 48)
_PHRASES_IN_SIGNS = _Patience(3.9, 100, 3.7, 120)
_WORDS_IN_SIGNS = _Patience(3.9, 200, 3.7, 250)
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
_PROSE_SHARE = 0.6
"""Words among the tokens of prose, at least: articles have 0.67 to 0.86, Python files 0.34 to 0.55 (with SmolLM2)."""


class Words:
    """How much of a word is in each token of a tokenizer; looked up when it is asked for, once for each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Substance] = {}

    def __call__(self, token: int) -> Substance:
        """2: a word or part of one; 1: a part of a character's bytes; 0: signs, digits, spaces or most lone letters."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = _weigh(self._tokenizer.decode([token]))
        return known


def _weigh(text: str) -> Substance:
    if text.strip() in _ONE_LETTER_WORDS:
        return 2
    letters = {character.lower() for character in text if character.isalpha()}
    # a script without upper and lower case says more in a letter; AAAA, on the other hand, says nothing
    if len(letters) >= 2 or any(letter == letter.upper() for letter in letters):
        return 2
    return 1 if "\ufffd" in text else 0


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
        substance: how much of a word a token is, as `Words` says; without it each token counts as a word, and tables
            of numbers and rules of dashes raise false alarms.
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
        begin, differing, seen, credit = place, 0, 0, 0
        lowest = max(self._floor, 0) + period
        for earlier in range(place, max(lowest, place - 2 * self.max_period) - 1, -1):
            if ids[earlier] == ids[earlier - period]:
                credit = min(credit + 1, _CREDIT)
                begin, differing = earlier, seen
            else:
                credit -= _MISS
                seen += 1
                if credit < 0:
                    break
        credit = max(0, min(_CREDIT, place - begin + 1 - differing * (_MISS + 1)))
        due = begin - period + max(math.ceil(_PROSE.periods * period), _PROSE.tokens) - 1
        if len(self._followed) >= _MOST:
            self._followed.remove(min(self._followed, key=lambda stretch: stretch.credit))
        self._followed.append(_Stretch(period, begin, differing, credit, max(place, due)))

    def _examine(self, stretch: _Stretch) -> Loop | None:
        """Whether a stretch is a loop by now; if not, when to look again (at least a quarter of a period later)."""
        place, period = len(self._ids) - 1, stretch.period
        compared = place - stretch.begin + 1
        patience = self._choose_patience(period)
        needed = max(math.ceil(patience.periods * period), patience.tokens)
        if stretch.differing:
            needed = max(needed, math.ceil(patience.periods_with_changes * period), patience.tokens_with_changes)
        if compared + period < needed:
            stretch.due = stretch.begin - period + needed - 1
            return None
        if stretch.differing and (
            patience is _SIGNS
            or stretch.differing > _DIFFERING * compared
            or self._count_slots(period) > _SLOTS * period
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
            return _PROSE
        substances = [self._substance(token) for token in self._ids[-period:]]
        words = [token for token, substance in zip(self._ids[-period:], substances, strict=True) if substance]
        several = len(set(words)) >= 4
        # an emoji or a broken character is a few tokens of bytes: a run of it is no prose
        if len(words) >= _PROSE_SHARE * period and (several or 2 in substances):
            return _PROSE
        return _PHRASES_IN_SIGNS if several else _WORDS_IN_SIGNS if words else _SIGNS

    def _count_slots(self, period: int) -> int:
        """How many places of the period changed more than once among the last four copies.

        With w, x, y, z the tokens of one place in four copies: one changed token (w x w w, or w w y w) and one change
        that stays (w w y y) are what a drifting loop has; a slot with content of its own has more.
        """
        ids = self._ids
        slots = 0
        for place in range(len(ids) - period, len(ids)):
            z, y, x = ids[place], ids[place - period], ids[place - 2 * period]
            if z == y == x:
                continue
            w = ids[place - 3 * period] if place >= 3 * period else x
            changes = (z != y) + (y != x) + (x != w)
            alone = changes == 2 and ((z == y == w) or (z == x == w))
            slots += changes > 1 and not alone
        return slots


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
