"""How much a sequence repeats itself: the measures of Welleck et al. (2020), Su et al. (2022) and others.

All take a sequence of tokens (a list, a tuple or a 1-D tensor of ids) or a string, which counts by words, in scripts
without spaces by characters. For an answer, give the answer alone: what stands in the prompt is no repetition. All
are one pass over the sequence. Over several answers, take the mean of the scores; measures of what a model predicts
rather than of what it wrote are in `lory.metrics.prediction`, and what several answers have in common in
`lory.metrics.similarity`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from lory.metrics.words import list_ngrams, list_units
from lory.runtime import UsageError

WINDOWS = (16, 32, 128, 512)
"""The windows l over which Welleck et al. average rep/l and wrep/l."""


def seq_rep_n(units: Sequence[Hashable], n: int) -> float:
    """The portion of repeated n-grams: 1 - |unique n-grams| / |n-grams|, in [0, 1).

    This is seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319),
    section "Evaluation Metrics". A sequence of fewer than `n` tokens has no n-gram and scores 0.0.

    Raises:
        UsageError: `n` is below 1.
    """
    _check_length(n, "n", "seq-rep-n")
    ngrams = list_ngrams(list_units(units), n)
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def rep_l(units: Sequence[Hashable], l: int) -> float:  # noqa: E741 - the paper's letter
    """The fraction of tokens that occur in the previous `l` tokens, in [0, 1); 0.0 for an empty sequence.

    This is rep/l of Welleck et al. (arXiv 1908.04319), section "Evaluation Metrics", of the sequence itself:
    rep/l = 1/T * sum over t of I[x_t in the l tokens before t]. The paper puts the model's top-1 prediction at each
    position in the place of x_t (`lory.metrics.prediction`); for a greedily generated sequence the two are the same.

    Raises:
        UsageError: `l` is below 1.
    """
    _check_length(l, "l", "rep/l")
    tokens = list_units(units)
    last_seen: dict[Hashable, int] = {}
    repeated = 0
    for position, token in enumerate(tokens):
        repeated += token in last_seen and position - last_seen[token] <= l
        last_seen[token] = position
    return repeated / len(tokens) if tokens else 0.0


def unique_tokens(units: Sequence[Hashable]) -> int:
    """How many different tokens occur: uniq-seq of Welleck et al. (arXiv 1908.04319), for one sequence."""
    return len(set(list_units(units)))


def diversity(units: Sequence[Hashable]) -> float:
    """The product over n = 2, 3, 4 of (1 - rep-n), in (0, 1]; 1.0 means that no 2-gram occurs twice.

    This is the diversity of Su et al., "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417),
    section "Evaluation Metrics", whose rep-n is `seq_rep_n` (there in percent, hence its division by 100).
    """
    tokens = list_units(units)
    return math.prod(1.0 - seq_rep_n(tokens, n) for n in (2, 3, 4))


def distinct_n(answers: Iterable[Sequence[Hashable]], n: int) -> float:
    """How many different n-grams there are in all answers together, divided by their tokens, in [0, 1].

    This is distinct-n of Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (arXiv 1510.03055), section "Evaluation", which divides by tokens, not by n-grams. It falls as answers are added,
    so only compare figures of equally many tokens. 0.0 for no tokens.

    Raises:
        UsageError: `n` is below 1.
    """
    _check_length(n, "n", "distinct-n")
    sequences = [list_units(answer) for answer in answers]
    tokens = sum(len(sequence) for sequence in sequences)
    different = {ngram for sequence in sequences for ngram in list_ngrams(sequence, n)}
    return len(different) / tokens if tokens else 0.0


def token_entropy(answers: Iterable[Sequence[Hashable]], n: int = 1) -> float:
    """Shannon entropy of the n-grams of all answers together, -sum of f * log f over their frequencies f, in nats.

    This is Ent-n of Zhang et al., "Generating Informative and Diverse Conversational Responses via Adversarial
    Information Maximization" (arXiv 1809.05972), section "Experiments". 0.0 where all n-grams are the same or none is.

    Raises:
        UsageError: `n` is below 1.
    """
    _check_length(n, "n", "the entropy of n-grams")
    counts = Counter(ngram for answer in answers for ngram in list_ngrams(list_units(answer), n))
    total = counts.total()
    return abs(math.fsum(-count / total * math.log(count / total) for count in counts.values()))


def repetition_scores(units: Sequence[Hashable]) -> dict[str, float]:
    """``seq_rep_1`` to ``seq_rep_4`` and ``diversity`` of one sequence, unrounded."""
    tokens = list_units(units)
    return {f"seq_rep_{n}": seq_rep_n(tokens, n) for n in (1, 2, 3, 4)} | {"diversity": diversity(tokens)}


def _check_length(length: int, letter: str, measure: str) -> None:
    if length < 1:
        raise UsageError(f"{letter} = {length} was given for {measure}; give a length of 1 or more tokens.")
