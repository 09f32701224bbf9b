"""How alike answers are: several answers to one prompt, and answers to different prompts that nearly coincide.

Two answers are compared by the sets of their n-grams (shingles), by Jaccard's |A and B| / |A or B|, the resemblance
of Broder, "On the resemblance and containment of documents" (1997). Answers are token ids or strings, as in
`lory.metrics.repetition`; an answer of fewer than n units is one shingle, the whole of it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

from lory.metrics.words import list_ngrams, list_units
from lory.runtime import UsageError

Shingles = frozenset[Hashable]


def list_shingles(answer: Sequence[Hashable], n: int) -> Shingles:
    """The set of the answer's n-grams; of a shorter answer, the whole as one."""
    units = list_units(answer)
    return frozenset(list_ngrams(units, n) or [tuple(units)])


def resemblance(one: Shingles, other: Shingles) -> float:
    """Jaccard's |A and B| / |A or B| of two sets of shingles, none of them empty, in [0, 1]."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def self_similarity(answers: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """How alike several answers to one prompt are: the mean resemblance of their pairs, in [0, 1]; 1.0: all the same.

    The role of Self-BLEU (Zhu et al., "Texygen", arXiv 1802.01886), by Broder's resemblance in place of BLEU: it does
    not depend on the order, on smoothing or on the number of answers. Every pair is compared, so it is meant for tens
    or hundreds of answers. 0.0 for fewer than two answers, which can't be alike.

    By hand, n = 1: "a b", "a b", "a c" resemble each other by 1, 1/3 and 1/3; the mean is 5/9.

    Raises:
        UsageError: `n` is below 1.
    """
    _check(n, 1.0)
    pairs = list(itertools.combinations([list_shingles(answer, n) for answer in answers], 2))
    return math.fsum(resemblance(one, other) for one, other in pairs) / len(pairs) if pairs else 0.0


def find_near_duplicates(
    answers: Sequence[Sequence[Hashable]], threshold: float = 0.8, n: int = 2
) -> list[tuple[int, ...]]:
    """Groups of answers that nearly coincide: each resembles the first of its group by `threshold` or more.

    Answers are taken in their order; one with the same shingles as an earlier one joins its group, one that resembles
    the first of several groups joins the nearest, and one that resembles none opens a group. So there are no chains
    in which the ends have nothing in common. The result is exact: candidates come from an index of each group's
    rarest shingles, of which two sets that resemble each other by the threshold must share one (prefix filtering:
    Chaudhuri et al., "A Primitive Operator for Similarity Joins in Data Cleaning", 2006; Bayardo et al., "Scaling Up
    All Pairs Similarity Search", 2007). 10,000 answers take seconds.

    Args:
        threshold: in (0, 1]; 1.0 finds equal sets of shingles only.
        n: shingle length, in tokens or words.

    Returns:
        Groups of two or more, as ascending indices into `answers`, in the order of their first ones.

    Raises:
        UsageError: `threshold` or `n` is out of range.
    """
    _check(n, threshold)
    sets = [list_shingles(answer, n) for answer in answers]
    ordered = _order_by_rarity(sets)
    groups: dict[int, list[int]] = {}
    index: defaultdict[int, list[int]] = defaultdict(list)
    equal: dict[Shingles, int] = {}
    for number, (shingles, ranks) in enumerate(zip(sets, ordered, strict=True)):
        first = equal.get(shingles)
        if first is None:
            # of sets that share less than this prefix, too little is left to reach the threshold
            prefix = ranks[: len(ranks) - math.ceil(threshold * len(ranks) - 1e-9) + 1]
            first = _find_nearest(shingles, prefix, sets, index, threshold)
            if first is None:
                first = number
                for rank in prefix:
                    index[rank].append(number)
            equal[shingles] = first
        groups.setdefault(first, []).append(number)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _order_by_rarity(sets: Sequence[Shingles]) -> list[list[int]]:
    """Each set's shingles as numbers, ascending, that are the smaller the fewer sets have the shingle."""
    counts = Counter(itertools.chain.from_iterable(sets))
    # the sort is stable and the Counter keeps the order in which sets are walked, which is no matter for the result
    ranks = {shingle: rank for rank, shingle in enumerate(sorted(counts, key=counts.__getitem__))}
    return [sorted(map(ranks.__getitem__, shingles)) for shingles in sets]


def _find_nearest(
    shingles: Shingles, prefix: Iterable[int], sets: Sequence[Shingles], index: dict[int, list[int]], threshold: float
) -> int | None:
    """The indexed set that resembles `shingles` most and by `threshold` at least, the earliest of equals."""
    best, nearest = threshold - 1e-9, None
    candidates = {number for rank in prefix if rank in index for number in index[rank]}
    for number in sorted(candidates):
        found = resemblance(shingles, sets[number])
        if found >= best if nearest is None else found > best:
            best, nearest = found, number
    return nearest


def _check(n: int, threshold: float) -> None:
    if n < 1:
        raise UsageError(f"n = {n} was given for the shingles of answers; give a length of 1 or more.")
    if not 0.0 < threshold <= 1.0:
        raise UsageError(f"A threshold of {threshold} was given for near-duplicates; it lies above 0 and up to 1.")
