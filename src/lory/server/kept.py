"""Keys and values of earlier prompts and answers, for a conversation's next question, which begins with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lory.server.rows import KeysValues

# Fewer equal tokens than this are read anew
_LEAST = 16


@dataclass(frozen=True, eq=False)
class _Text:
    adapter: int | None
    ids: tuple[int, ...]
    states: KeysValues


class KeptTexts:
    """The texts that were used last, up to so many tokens together; 0 keeps none."""

    def __init__(self, tokens: int) -> None:
        self.most = tokens
        self._texts: list[_Text] = []

    def find(self, ids: Sequence[int], adapter: int | None) -> tuple[KeysValues, int]:
        """Keys and values of the text that begins like `ids`, and for how many tokens it does; ([], 0) without one.

        At least the last token is left to be read, for its logits.
        """
        best, most = None, _LEAST - 1
        for text in self._texts:
            if text.adapter == adapter and (same := _count_same(text.ids, ids)) > most:
                best, most = text, same
        if best is None:
            return [], 0
        self._texts.remove(best)
        self._texts.append(best)
        return best.states, min(most, len(ids) - 1)

    def wants(self, tokens: int) -> bool:
        """Whether a text of so many tokens is worth reading it out."""
        return _LEAST <= tokens <= self.most

    def keep(self, ids: Sequence[int], adapter: int | None, states: KeysValues) -> None:
        """Keep a text; texts that it begins with, and what was used longest ago, make room."""
        new = _Text(adapter, tuple(ids), states)
        self._texts = [
            text for text in self._texts if text.adapter != adapter or _count_same(text.ids, new.ids) < len(text.ids)
        ]
        self._texts.append(new)
        while sum(len(text.ids) for text in self._texts) > self.most:
            self._texts.pop(0)

    def forget(self, adapter: int) -> None:
        """Drop the texts of an adapter."""
        self._texts = [text for text in self._texts if text.adapter != adapter]


def _count_same(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
