"""Formulas in LaTeX, compared by their tokens: where spaces stand, and how many, makes no difference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lory.metrics.text import bleu, edit_distance

_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\S", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")


def split_formula(formula: str) -> list[str]:
    r"""The tokens of a formula, as im2latex writes them: commands, and every other sign by itself.

    Deng et al., "Image-to-Markup Generation with Coarse-to-Fine Attention" (arXiv 1609.04938).
    """
    return _TOKEN.findall(formula)


def are_formulas(texts: Sequence[str]) -> bool:
    """Whether texts look like LaTeX: a command in at least half of them."""
    commands = sum(bool(_COMMAND.search(text)) for text in texts)
    return bool(texts) and 2 * commands >= len(texts)


def score_formulas(answers: Sequence[str], targets: Sequence[str], with_bleu: bool = True) -> dict[str, Any]:
    """Exact match, mean normalized edit distance and, of the whole corpus, BLEU in percent, all over tokens.

    Args:
        with_bleu: sacrebleu is there.
    """
    pairs = [(split_formula(answer), split_formula(target)) for answer, target in zip(answers, targets, strict=True)]
    scores: dict[str, Any] = {
        "exact_match": fmean(answer == target for answer, target in pairs),
        "edit_distance": fmean(compare_formulas(answer, target) for answer, target in pairs),
    }
    if with_bleu:
        joined = [[" ".join(tokens) for tokens in texts] for texts in zip(*pairs, strict=True)]
        scores["bleu"] = bleu(joined[0], joined[1], "none")["bleu"]
    return scores


def compare_formulas(one: Sequence[str], other: Sequence[str]) -> float:
    """Edit distance in tokens / length of the longer one."""
    return edit_distance(one, other) / max(len(one), len(other), 1)
