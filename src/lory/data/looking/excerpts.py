"""Excerpts of encoded samples: their first words, and the languages they are in."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lory.data.encoding.store import Store
from lory.data.looking.languages import OTHER, guess_language

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    Array = np.ndarray[Any, Any]

_LANGUAGE_TOKENS = 64
_SHOWN_TOKENS = 100
_SHOWN_CHARACTERS = 80


class Excerpts:
    """Texts of a store's samples.

    Most samples of a source tend to begin with the same tokens (the template's marks, a system prompt), which say
    nothing about any of them, so these are passed over.
    """

    def __init__(self, store: Store, samples: Array, tokenizer: PreTrainedTokenizerBase) -> None:
        """`samples`: numbers of those that are used."""
        self.store, self.tokenizer = store, tokenizer
        self._beginning = self._find_beginning(samples)

    def _find_beginning(self, samples: Array) -> list[int]:
        """The tokens with which half of the samples begin or more, of 64 that are looked at."""
        import numpy as np

        if not len(samples):
            return []
        chosen = np.unique(samples[np.linspace(0, len(samples) - 1, 64).astype(np.int64)])
        alike = [ids.tolist() for group in self.store.ids(chosen) for ids in group]
        enough = max(2, len(alike) / 2)
        beginning: list[int] = []
        while True:
            at = len(beginning)
            alike = [ids for ids in alike if len(ids) > at]
            ((token, count),) = Counter(ids[at] for ids in alike).most_common(1) or [(0, 0)]
            if count < enough:
                break
            beginning.append(token)
            alike = [ids for ids in alike if ids[at] == token]
        # no further than the template goes: many questions begin alike, too
        marks = set(self.tokenizer.all_special_ids)
        while beginning and beginning[-1] not in marks and not self._decode([beginning[-1:]])[0].endswith("\n"):
            beginning.pop()
        return beginning

    def _skip(self, ids: Array, length: int) -> list[int]:
        """Some tokens of a sample after what it shares with most of the others."""
        pairs = zip(ids[: len(self._beginning)].tolist(), self._beginning, strict=False)
        start = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        rest: list[int] = ids[start if start < len(ids) else 0 :][:length].tolist()
        return rest

    def begin(self, sample: int) -> str:
        """The first words of a sample, in one line."""
        import numpy as np

        ids = next(iter(self.store.ids(np.array([sample]))))[0]
        # the last character may be cut in the middle
        text = " ".join(self._decode([self._skip(ids, _SHOWN_TOKENS)])[0].rstrip("\ufffd").split())
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"

    def count_languages(self, samples: Array) -> Counter[str]:
        """In which languages samples are, each counted as often as it is given.

        What is learnt last tells (an answer, since a sample ends with one); where that is unsure, the first words do.
        """
        import numpy as np

        numbers, times = np.unique(samples, return_counts=True)
        learnt = np.minimum(self.store.supervised[numbers], _LANGUAGE_TOKENS)
        rest = zip(learnt.tolist(), times.tolist(), strict=True)
        found: Counter[str] = Counter()
        for group in self.store.ids(numbers):
            lengths, counts = zip(*itertools.islice(rest, len(group)), strict=True)
            ends = [ids[len(ids) - length :].tolist() for ids, length in zip(group, lengths, strict=True)]
            codes = [guess_language(text) for text in self._decode(ends)]
            unsure = [at for at, code in enumerate(codes) if code == OTHER]
            begins = [self._skip(group[at], _LANGUAGE_TOKENS) for at in unsure]
            for at, text in zip(unsure, self._decode(begins), strict=True):
                codes[at] = guess_language(text)
            for code, count in zip(codes, counts, strict=True):
                found[code] += count
        return found

    def _decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [str(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)] if ids else []
