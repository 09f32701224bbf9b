"""Which conversations are trained on and which are evaluated on, without a question in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

HELD_OUT = "its question is in data.eval, too"
"""The reason under which records to train on are counted that are evaluated on."""


def split_questions(questions: Sequence[Array], fraction: float, seed: int) -> tuple[list[Array], list[Array]]:
    """Choose about `fraction` of each source's conversations for evaluation, whole questions at a time.

    Args:
        questions: for each source, (conversations) hashes of their first questions.

    Returns:
        For each source, the numbers of its conversations to train on, and of those to evaluate on. A question that one
        source keeps for evaluation is not trained on through another.
    """
    import numpy as np

    chosen = [_choose_questions(hashes, fraction, seed) for hashes in questions]
    everywhere = np.unique(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.uint64)
    held_out = [np.isin(hashes, everywhere) for hashes in questions]
    return [np.flatnonzero(~mask) for mask in held_out], [np.flatnonzero(mask) for mask in held_out]


def exclude_questions(questions: Sequence[Array], held_out: Sequence[Array]) -> list[Array]:
    """For each source, the numbers of the conversations whose question is not among `held_out`."""
    import numpy as np

    asked = np.unique(np.concatenate(held_out))
    return [np.flatnonzero(~np.isin(hashes, asked)) for hashes in questions]


def _choose_questions(hashes: Array, fraction: float, seed: int) -> Array:
    """Questions whose conversations make up about `fraction`; a question's place depends on it and the seed alone."""
    import numpy as np

    questions, counts = np.unique(hashes, return_counts=True)
    wanted, taken = fraction * len(hashes), 0
    chosen = []
    for number in np.argsort(scatter(questions, seed), kind="stable").tolist():
        if taken + 0.5 > wanted:
            break
        # one that is asked too often to fit is passed over
        if taken + counts[number] / 2 <= wanted:
            chosen.append(number)
            taken += int(counts[number])
    return questions[np.array(chosen, dtype=np.int64)]


def scatter(hashes: Array, seed: int) -> Array:
    """64-bit numbers that lie at random, a function of the hashes and the seed alone.

    (The finaliser of SplitMix64: Steele et al. 2014, Fast splittable pseudorandom number generators.)
    """
    import numpy as np

    start = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), dtype=np.uint64)
    mixed = hashes ^ start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
