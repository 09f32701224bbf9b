"""Predictions compared with their targets: text, repetition, parroting and classes."""

from __future__ import annotations

import importlib.util
import itertools
import string
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import Any

from lory.evaluate.answers import Prediction
from lory.evaluate.formulas import are_formulas, compare_formulas, score_formulas, split_formula
from lory.metrics import text
from lory.metrics.classification import classification_scores
from lory.metrics.parroting import find_parroting
from lory.metrics.repetition import distinct_n, repetition_scores, unique_tokens
from lory.metrics.similarity import self_similarity

MOST_LABEL_WORDS = 4
MOST_LABEL_CHARACTERS = 40


def score_each(predictions: Sequence[Prediction]) -> None:
    """Give each prediction its own scores."""
    formulas = are_formulas([prediction.target for prediction in predictions if prediction.kind == "answer"])
    for prediction in predictions:
        if prediction.question is None or prediction.answer is None:
            continue
        record, scores = prediction.question.record, prediction.scores
        if prediction.kind == "answer":
            scores["exact_match"] = text.exact_match([prediction.answer], [prediction.target])
            scores["edit_distance"] = text.normalized_edit_distance([prediction.answer], [prediction.target])
            scores |= record.scores()
            if formulas:
                pair = [split_formula(prediction.answer), split_formula(prediction.target)]
                scores["formula_edit_distance"] = compare_formulas(*pair)
        scores |= repetition_scores(prediction.answer_ids)


def score_answers(predictions: Sequence[Prediction], notes: list[str]) -> dict[str, Any]:
    """Scores of answers against their targets, over all of them; ``formulas`` where the targets are LaTeX.

    Args:
        notes: gets what could not be computed, and why.
    """
    answers, targets = [p.answer or "" for p in predictions], [p.target for p in predictions]
    scores: dict[str, Any] = {
        "answers": len(predictions),
        "cut": sum(p.cut for p in predictions),
        "empty": sum(not answer.strip() for answer in answers),
        "mean_tokens": fmean(p.tokens for p in predictions),
        "exact_match": fmean(p.scores["exact_match"] for p in predictions),
        "edit_distance": fmean(p.scores["edit_distance"] for p in predictions),
    }
    has_bleu = _has("sacrebleu", "BLEU", notes)
    if has_bleu:
        found = text.bleu(answers, targets)
        scores |= {"bleu": found["bleu"], "bleu_signature": found["signature"]}
    if are_formulas(targets):
        scores["formulas"] = score_formulas(answers, targets, has_bleu)
    if _has("rouge_score", "ROUGE", notes):
        scores |= text.rouge(answers, targets)
    return scores | score_repetition(predictions) | _score_parroting(predictions)


def score_repetition(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Repetition in the answers, and in the targets, which it should come to (Welleck et al., arXiv 1908.04319).

    ``self_similarity`` is the mean over prompts with several answers.
    """
    own = [p.answer_ids for p in predictions]
    true = [p.question.target_ids for p in predictions if p.question]
    scores: dict[str, Any] = {"repetition": _repetition(own), "target_repetition": _repetition(true)}
    by_question: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    for prediction in predictions:
        by_question[id(prediction.question)].append(prediction.answer_ids)
    if several := [answers for answers in by_question.values() if len(answers) > 1]:
        scores["self_similarity"] = fmean(self_similarity(answers) for answers in several)
    return scores


def _repetition(sequences: Sequence[Sequence[int]]) -> dict[str, float]:
    each = [repetition_scores(ids) for ids in sequences]
    means = {name: fmean(scores[name] for scores in each) for name in each[0]}
    distinct = {f"distinct_{n}": distinct_n(sequences, n) for n in (1, 2)}
    return means | distinct | {"uniq_seq": float(unique_tokens(list(itertools.chain(*sequences))))}


def _score_parroting(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How many answers each kind of parroting concerns; of the targets, too, some of which may be alike with reason."""
    prompts = [p.question.prompt_text for p in predictions if p.question]
    several = any(p.sample for p in predictions)
    found = _find(prompts, [p.answer or "" for p in predictions], several)
    for number, kinds in found.items():
        predictions[number].parroting = sorted(kinds)
    first = [number for number, p in enumerate(predictions) if p.sample == 0]
    true = _find([prompts[number] for number in first], [predictions[number].target for number in first], False)
    return {"parroting": _count(found), "target_parroting": _count(true)}


def _find(prompts: Sequence[str], answers: Sequence[str], several: bool) -> dict[int, set[str]]:
    # greedy decoding gives the same answer each time a prompt comes, which is no parroting
    fewest = 3 if several else len(answers) + 1
    kinds: defaultdict[int, set[str]] = defaultdict(set)
    for finding in find_parroting(prompts, answers, min_answers=fewest):
        for number in finding.answers:
            kinds[number].add(finding.kind)
    return kinds


def _count(kinds: dict[int, set[str]]) -> dict[str, int]:
    counts = Counter(itertools.chain.from_iterable(kinds.values()))
    return {kind: counts[kind] for kind in ("word", "sentence", "answer", "evasion")}


def score_classes(predictions: Sequence[Prediction], notes: list[str]) -> dict[str, Any] | None:
    """Accuracy, macro-F1 and MCC where the targets are a few short labels; None elsewhere.

    Letter case and the signs around a label make no difference. An answer that is none of the labels is wrong, and
    counts as a class of its own, ``unknown``, whose F1 is 0.
    """
    labels = [_tidy_label(p.target) for p in predictions]
    if not find_classes(labels) or not _has("sklearn", "Class scores", notes):
        return None
    known = set(labels)
    answers: list[Hashable] = [label if (label := _tidy_label(p.answer or "")) in known else None for p in predictions]
    scores: dict[str, Any] = {"classes": len(known), "unknown": answers.count(None)}
    return scores | classification_scores(answers, labels)


def find_classes(labels: Sequence[str]) -> set[str]:
    """The labels if they look like classes: 2 to 50, none longer than a few words, each there 3 times on average."""
    classes = set(labels)
    short = all(
        label and len(label) <= MOST_LABEL_CHARACTERS and len(label.split()) <= MOST_LABEL_WORDS for label in classes
    )
    return classes if short and 2 <= len(classes) <= min(50, len(labels) // 3) else set()


def _tidy_label(label: str) -> str:
    return " ".join(label.casefold().split()).strip(string.punctuation + string.whitespace)


def _has(module: str, what: str, notes: list[str]) -> bool:
    """Whether an optional library is there; otherwise a note says how to get it."""
    if importlib.util.find_spec(module) is not None:
        return True
    name = {"rouge_score": "rouge-score", "sklearn": "scikit-learn"}.get(module, module)
    note = f"{what} left out, since {name} is not installed; to install it: {text.INSTALL}"
    if note not in notes:
        notes.append(note)
    return False
