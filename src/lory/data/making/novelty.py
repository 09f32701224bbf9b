"""Near duplicates among short texts, found as they come, without comparing each with all."""

from __future__ import annotations

import itertools
import math

from lory.metrics.words import split_words

_ROUNDING = 1e-9


class NoveltyIndex:
    """Texts that are unlike each other.

    Likeness is the Jaccard coefficient of the sets of words and word pairs, |A & B| / |A | B|. Self-instruct (Wang et
    al. 2022, arXiv 2212.10560, section 2.2) takes ROUGE-L above 0.7 for this, which compares each new text with all
    others; a likeness of 0.4 draws nearly the same line.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: the likeness, above 0 and up to 1, from which on a text counts as a near duplicate."""
        self.threshold = threshold
        self._numbers: dict[tuple[str, ...], int] = {}
        self._having: list[list[int]] = []
        """For each shingle's number, the texts that have it."""
        self._texts: list[frozenset[int]] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> bool:
        """Take the text in, unless it is like one that is there; returns whether it was taken."""
        shingles = _shingle(text)
        known = [number for shingle in shingles if (number := self._numbers.get(shingle)) is not None]
        if self._is_known(known, len(shingles)):
            return False
        for shingle in shingles:
            if shingle not in self._numbers:
                self._numbers[shingle] = len(self._having)
                self._having.append([])
            self._having[self._numbers[shingle]].append(len(self._texts))
        self._texts.append(frozenset(self._numbers[shingle] for shingle in shingles))
        return True

    def _is_known(self, known: list[int], size: int) -> bool:
        """Whether a text of `size` shingles, of which `known` were met before, is like one that is there."""
        # a like text has at least so many of the shingles, so it has one of any len(known) - least + 1 of the known
        # ones: the rarest are looked up
        least = math.ceil(self.threshold * size - _ROUNDING)
        lists = sorted((self._having[number] for number in known), key=len)[: max(0, len(known) - least + 1)]
        own = frozenset(known)
        for text in set(itertools.chain.from_iterable(lists)):
            shared, others = len(own & self._texts[text]), len(self._texts[text])
            if shared >= self.threshold * (size + others - shared) - _ROUNDING:
                return True
        return False


def _shingle(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    # a text of signs alone is like itself
    return {*((word,) for word in words), *itertools.pairwise(words)} or {(text,)}
