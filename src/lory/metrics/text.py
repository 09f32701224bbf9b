"""How close answers come to references: exact match, edit distance, BLEU and ROUGE."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import Any

from lory.metrics.words import split_words
from lory.runtime import UsageError

INSTALL = "pip install 'lory-llm[eval]'"

References = Sequence[str | Sequence[str]]
"""For each answer one reference, or several of which any will do."""


def exact_match(answers: Sequence[str], references: References) -> float:
    """The share of answers that are one of their references, in [0, 1].

    Upper and lower case and punctuation count; the kind and amount of white space and Unicode's spelling of a
    character do not (form NFC).

    Raises:
        UsageError: there are no answers, or not as many references.
    """
    several = _list_references(answers, references)
    pairs = zip(answers, several, strict=True)
    return fmean(_tidy(answer) in {_tidy(text) for text in texts} for answer, texts in pairs)


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of elements that turn one into other.

    Hyyrö's bit-parallel form of Myers' algorithm ("A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit
    Distances", 2003): a column of the table is kept as the bits of two numbers, where it grows and where it shrinks.
    """
    if not one:
        return len(other)
    places: dict[Hashable, int] = {}
    for number, element in enumerate(one):
        places[element] = places.get(element, 0) | 1 << number
    whole, last = (1 << len(one)) - 1, 1 << len(one) - 1
    grows, shrinks, distance = whole, 0, len(one)
    for element in other:
        here = places.get(element, 0)
        diagonal = ((((here & grows) + grows) ^ grows) | here | shrinks) & whole
        right_grows = shrinks | (~(diagonal | grows) & whole)
        right_shrinks = diagonal & grows
        distance += bool(right_grows & last) - bool(right_shrinks & last)
        right_grows, right_shrinks = (right_grows << 1 | 1) & whole, (right_shrinks << 1) & whole
        grows = right_shrinks | (~(diagonal | right_grows) & whole)
        shrinks = right_grows & diagonal
    return distance


def normalized_edit_distance(answers: Sequence[str], references: References) -> float:
    """The mean over answers of edit distance in characters / length of the longer text, to the nearest reference.

    In [0, 1]; 0.0 where both are empty. White space and Unicode's spelling are levelled as in `exact_match`.

    Raises:
        UsageError: there are no answers, or not as many references.
    """
    several = _list_references(answers, references)
    pairs = zip(map(_tidy, answers), several, strict=True)
    return fmean(min(_compare(answer, _tidy(text)) for text in texts) for answer, texts in pairs)


def _compare(one: str, other: str) -> float:
    return edit_distance(one, other) / max(len(one), len(other), 1)


def bleu(answers: Sequence[str], references: References, tokenizer: str | None = None) -> dict[str, Any]:
    """Corpus BLEU of sacrebleu (Papineni et al., 2002; Post, arXiv 1804.08771).

    Args:
        tokenizer: sacrebleu's name of it; None: ``zh`` where most letters of the references are Chinese, else ``13a``.

    Returns:
        ``bleu`` in percent, and sacrebleu's ``signature``, without which BLEU figures can't be compared.

    Raises:
        UsageError: there are no answers, or not as many references, or sacrebleu is missing.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UsageError(f"BLEU needs sacrebleu, which is not installed; to install it: {INSTALL}") from error
    several = _list_references(answers, references)
    metric = BLEU(tokenize=tokenizer or _choose_tokenizer(several))
    # sacrebleu wants the first references of all answers, then the second ones, ..., None where there is none
    streams: list[Any] = [
        [texts[place] if place < len(texts) else None for texts in several] for place in range(max(map(len, several)))
    ]
    score = metric.corpus_score(list(answers), streams).score
    return {"bleu": float(score), "signature": str(metric.get_signature())}


def rouge(answers: Sequence[str], references: References) -> dict[str, float]:
    """ROUGE F-measures of rouge-score (Lin, 2004), in percent: ``rouge1``, ``rouge2``, ``rougeL``, means over answers.

    Of several references the one counts that gives the highest. Where all letters are ASCII the texts are split as
    rouge-score does by default, without stemming; elsewhere, as its own way drops all other letters, by `split_words`.

    Raises:
        UsageError: there are no answers, or not as many references, or rouge-score is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(f"ROUGE needs rouge-score, which is not installed; to install it: {INSTALL}") from error
    several = _list_references(answers, references)
    plain = all(c.isascii() or not c.isalpha() for texts in [answers, *several] for text in texts for c in text)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=None if plain else _Words())
    scores = [scorer.score_multi(texts, answer) for answer, texts in zip(answers, several, strict=True)]
    return {name: 100.0 * fmean(score[name].fmeasure for score in scores) for name in names}


class _Words:
    """`split_words` as rouge-score wants its tokenizers."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _list_references(answers: Sequence[str], references: References) -> list[list[str]]:
    if not answers or len(answers) != len(references):
        raise UsageError(f"{len(answers)} answers and {len(references)} references were given; give one for each.")
    several = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if not all(several):
        raise UsageError(f"Answer {several.index([]) + 1} has no reference; give it one, or leave the answer out.")
    return several


def _tidy(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _choose_tokenizer(references: Sequence[Sequence[str]]) -> str:
    letters = [c for texts in references for text in texts for c in text if c.isalpha()]
    return "zh" if sum("\u4e00" <= c <= "\u9fff" for c in letters) * 2 > len(letters) else "13a"
