"""An answer's tokens as text while they come: whole characters, and never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lory.generate import decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability by the model's own scores, and the likeliest tokens at its place."""

    token: int
    logprob: float | None
    """None: the first token of a prompt, which nothing foretells."""
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0
    """Where its text begins, in characters of the answer."""


class TextStream:
    """The text of one answer's tokens; `feed` and `finish` give what is certain to stay.

    Args:
        stops: strings that end the answer; neither they nor what follows is given, wherever tokens part them.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        # as in `lory.generate.decode_pieces`: ids[:end] are text, ids[start:end] are decoded once more
        self._start = self._end = 0
        self._held = ""
        self._given = 0
        self._scored: list[ScoredToken] = []
        self.stopped = False

    @property
    def offset(self) -> int:
        """Characters so far, those held back included."""
        return self._given + len(self._held)

    def feed(self, token: int, scored: ScoredToken | None = None) -> str:
        """Take the next token; the text that has become certain."""
        if scored is not None:
            self._scored.append(scored)
        self._ids.append(token)
        said = decode_text(self._tokenizer, self._ids[self._start : self._end])
        text = decode_text(self._tokenizer, self._ids[self._start :])
        # the replacement character is a character whose other bytes are still to come
        if len(text) > len(said) and not text.endswith("\ufffd"):
            self._held += text[len(said) :]
            self._start, self._end = self._end, len(self._ids)
        return self._give(final=False)

    def finish(self) -> str:
        """No more tokens come; the rest of the text."""
        if self.stopped:
            return ""
        said = decode_text(self._tokenizer, self._ids[self._start : self._end])
        self._held += decode_text(self._tokenizer, self._ids[self._start :])[len(said) :]
        return self._give(final=True)

    def take_scored(self, final: bool = False) -> tuple[ScoredToken, ...]:
        """The tokens whose text was given since the last call.

        Args:
            final: the answer is over; what has no text of its own comes along, but nothing from a stop string on.
        """
        rest = final and not self.stopped
        ready = [scored for scored in self._scored if rest or scored.offset < self._given]
        self._scored = self._scored[len(ready) :]
        return tuple(ready)

    def _give(self, final: bool) -> str:
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            kept = 0 if final else self._count_begun()
            certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._given += len(certain)
        return certain

    def _count_begun(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
