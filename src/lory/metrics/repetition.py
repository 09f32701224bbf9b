"""How much a sequence of tokens repeats itself: the measures of Welleck et al. (2020) and Su et al. (2022).

All take token ids (a list, a tuple or a 1-D tensor) and count inside that one sequence; over several answers, take the
mean of the scores. For an answer, give the tokens of the answer alone: what stands in the prompt is no repetition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lory.runtime import UsageError


def _list_ids(ids: Sequence[int]) -> list[int]:
    # the elements of a tensor hash by identity: as they are, no two would ever count as the same token
    return [int(token) for token in ids]


def seq_rep_n(ids: Sequence[int], n: int) -> float:
    """The portion of repeated n-grams: 1 - |unique n-grams| / |n-grams|, in [0, 1).

    This is seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319),
    section "Evaluation Metrics". A sequence of fewer than `n` tokens has no n-gram and scores 0.0.

    Raises:
        UsageError: `n` is below 1.
    """
    if n < 1:
        raise UsageError(f"n = {n} was given for seq-rep-n; give a length of 1 or more tokens.")
    tokens = _list_ids(ids)
    ngrams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def rep_l(ids: Sequence[int], l: int) -> float:  # noqa: E741 - the paper's letter
    """The fraction of tokens that occur in the previous `l` tokens, in [0, 1); 0.0 for an empty sequence.

    This is rep/l of Welleck et al. (arXiv 1908.04319), section "Evaluation Metrics":
    rep/l = 1/T * sum over t of I[x_t in the l tokens before t]. The paper puts the model's top-1 prediction at each
    position in the place of x_t; for a greedily generated sequence the two are the same.

    Raises:
        UsageError: `l` is below 1.
    """
    if l < 1:
        raise UsageError(f"l = {l} was given for rep/l; give a window of 1 or more tokens.")
    tokens = _list_ids(ids)
    last_seen: dict[int, int] = {}
    repeated = 0
    for position, token in enumerate(tokens):
        repeated += token in last_seen and position - last_seen[token] <= l
        last_seen[token] = position
    return repeated / len(tokens) if tokens else 0.0


def unique_tokens(ids: Sequence[int]) -> int:
    """How many different tokens occur: uniq-seq of Welleck et al. (arXiv 1908.04319), for one sequence."""
    return len(set(_list_ids(ids)))


def diversity(ids: Sequence[int]) -> float:
    """The product over n = 2, 3, 4 of (1 - rep-n), in (0, 1]; 1.0 means that no 2-gram occurs twice.

    This is the diversity of Su et al., "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417),
    section "Evaluation Metrics", whose rep-n is `seq_rep_n` (there in percent, hence its division by 100).
    """
    return math.prod(1.0 - seq_rep_n(ids, n) for n in (2, 3, 4))


def repetition_scores(ids: Sequence[int]) -> dict[str, float]:
    """``seq_rep_1`` to ``seq_rep_4`` and ``diversity`` of one sequence, unrounded."""
    return {f"seq_rep_{n}": seq_rep_n(ids, n) for n in (1, 2, 3, 4)} | {"diversity": diversity(ids)}
