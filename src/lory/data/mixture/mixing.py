"""Mixing sources: one after the other, or in proportion to their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Mixing = Literal["concat", "first_exhausted", "all_exhausted"]


def mix(parts: Sequence[Array], weights: Sequence[float], mixing: Mixing, seed: int) -> list[Array]:
    """How often each conversation of each source is taken in an epoch.

    Args:
        parts: for each source, the numbers of its conversations.
        weights: for each source, its share among all; they need not add up to 1.
        mixing: `concat` takes each conversation once and leaves the weights aside. `first_exhausted` takes as many
            conversations as the shares allow until a source has no more, so that none is repeated. `all_exhausted` goes
            on until every conversation was taken, so that those of the smaller sources are repeated.

    Returns:
        For each source, the numbers of the conversations to take, in their order; some may be missing, some repeated.
        Which ones is drawn with `seed`.
    """
    import numpy as np

    if mixing == "concat":
        return list(parts)
    # how many epochs of the mixture's smallest unit each source lasts
    lasting = [len(part) / weight for part, weight in zip(parts, weights, strict=True) if len(part)]
    if not lasting:
        return list(parts)
    unit = min(lasting) if mixing == "first_exhausted" else max(lasting)
    taken = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        wanted = round(unit * weight) if len(part) else 0
        whole, rest = divmod(wanted, len(part)) if len(part) else (0, 0)
        drawn = np.random.default_rng([seed, number]).permutation(part)[:rest]
        taken.append(np.sort(np.concatenate([np.repeat(part, whole), drawn]), kind="stable"))
    return taken
