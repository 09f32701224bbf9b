"""The four kinds of parroting told apart: a word, a sentence, an answer to one prompt, an answer to all prompts.

What is looked for is what no attentive writer does, so that a finding can be trusted: verses with a refrain, lists,
tables of numbers and short answers such as labels are left alone. The graded measures are in
`lory.metrics.repetition` and `lory.metrics.similarity`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lory.metrics.similarity import find_near_duplicates
from lory.metrics.words import split_pieces, split_sentences, split_words
from lory.runtime import UsageError

ParrotingKind = Literal["word", "sentence", "answer", "evasion"]

WORD_COPIES = 5
"""A word or a phrase of up to `PHRASE_WORDS` is parroted if it stands so many times in a row; "no, no, no" is fine."""
PHRASE_WORDS = 4
SENTENCE_COPIES = 3
"""A sentence, or any longer phrase in a row, is parroted if it stands this many times in one answer."""
SENTENCE_SHARE = 1 / 3
"""A sentence whose copies are not in a row is parroted if they make up so much of the answer; a refrain is less."""
SENTENCE_WORDS = 3
"""Shorter sentences ("Yes.") may come again, and so may shorter answers to different prompts (labels, numbers)."""
_SEED_WORDS = 5


@dataclass(frozen=True, slots=True)
class Parroting:
    """One finding."""

    kind: ParrotingKind
    """``word``: a word or short phrase again and again in a row; ``sentence``: a sentence or long phrase again and
    again in one answer; ``answer``: the same answer again and again to one prompt; ``evasion``: the same answer to
    different prompts."""
    answers: tuple[int, ...]
    """The answers it concerns, as indices."""
    copies: int
    """How many times the text stands there: in the one answer, or as so many answers."""
    text: str
    """What is repeated: as it was first written, but in lower case for ``word`` and for phrases."""


def find_parroting(
    prompts: Sequence[str],
    answers: Sequence[str],
    threshold: float = 0.8,
    min_answers: int = 3,
    min_prompts: int = 3,
) -> list[Parroting]:
    """All parroting in `answers`, of which the i-th answers the i-th of `prompts`.

    Args:
        prompts: equal ones mark samples of one prompt; upper and lower case and punctuation make no difference.
        threshold: resemblance from which two answers count as the same (`find_near_duplicates`).
        min_answers: so many same answers to one prompt are parroting. Only meaningful where answers are sampled:
            greedy decoding gives the same answer each time.
        min_prompts: so many different prompts with the same answer are parroting. Raise it where prompts are
            paraphrases of one another, whose answers should be alike.

    Returns:
        Findings by kind, in the order of `ParrotingKind`, and then by answer. An answer can be in several.

    Raises:
        UsageError: there are not as many prompts as answers.
    """
    if len(prompts) != len(answers):
        raise UsageError(f"{len(prompts)} prompts were given for {len(answers)} answers; give each answer its prompt.")
    words = [split_words(answer) for answer in answers]
    findings = []
    for number, answer in enumerate(answers):
        run, sentence = find_word_run(words[number]), find_repeated_sentence(answer)
        # a sentence of few words, again and again, is a run of a phrase, too
        if run and not (sentence and set(run[0]) == set(split_words(sentence[0]))):
            findings.append(Parroting("word", (number,), run[1], " ".join(run[0])))
        if sentence:
            findings.append(Parroting("sentence", (number,), sentence[1], sentence[0]))
    questions = [" ".join(split_words(prompt)) or prompt for prompt in prompts]
    by_question = defaultdict(list)
    for number, question in enumerate(questions):
        by_question[question].append(number)
    for numbers in by_question.values():
        if len(numbers) >= min_answers:
            for group in find_near_duplicates([words[number] for number in numbers], threshold):
                same = tuple(numbers[member] for member in group)
                if len(same) >= min_answers:
                    findings.append(Parroting("answer", same, len(same), answers[same[0]]))
    for group in find_near_duplicates(words, threshold):
        # labels and numbers are rightly given to many prompts; to say nothing never is
        short = 0 < len(words[group[0]]) < SENTENCE_WORDS
        if not short and len({questions[member] for member in group}) >= min_prompts:
            findings.append(Parroting("evasion", group, len(group), answers[group[0]]))
    kinds = ("word", "sentence", "answer", "evasion")
    return sorted(findings, key=lambda finding: (kinds.index(finding.kind), finding.answers))


def find_word_run(words: Sequence[str]) -> tuple[tuple[str, ...], int] | None:
    """The word or phrase of up to `PHRASE_WORDS` that most often stands in a row, at least `WORD_COPIES` times.

    Phrases without a letter are left alone: tables and long numbers have them. One pass for each phrase length.

    Returns:
        The phrase and how many times it stands in a row; None if there is none.
    """
    best: tuple[tuple[str, ...], int] | None = None
    for period in range(1, PHRASE_WORDS + 1):
        matched = 0
        for place in range(period, len(words)):
            matched = matched + 1 if words[place] == words[place - period] else 0
            copies = matched // period + 1
            if copies >= WORD_COPIES and (best is None or copies > best[1]):
                start = place - copies * period + 1
                phrase = tuple(words[start : start + period])
                if _has_letter(phrase):
                    best = phrase, copies
    return best


def find_repeated_sentence(answer: str) -> tuple[str, int] | None:
    """The sentence that stands `SENTENCE_COPIES` times or more in the answer, or a long phrase so often in a row.

    Sentences count wherever they stand, by their words, if all copies make up `SENTENCE_SHARE` of the answer's; the
    phrase need not be a sentence and has more than `PHRASE_WORDS` words. One pass over the answer for each.

    Returns:
        The sentence as first written (a phrase: in lower case), and how many times it is there; None if there is none.
    """
    first: dict[tuple[str, ...], str] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    total = 0
    for sentence in split_sentences(answer):
        pieces = split_pieces(sentence)
        total += len(pieces)
        if len(pieces) >= SENTENCE_WORDS and _has_letter(pieces):
            # how it ends makes no difference; punctuation inside does, as in lines of code
            words = (*pieces[:-1], *split_words(pieces[-1]))
            first.setdefault(words, sentence)
            counts[words] += 1
    for words, count in counts.most_common(1):
        if count >= SENTENCE_COPIES and count * len(words) >= SENTENCE_SHARE * total:
            return first[words], count
    return _find_phrase_run(split_pieces(answer))


def _has_letter(words: Sequence[str]) -> bool:
    return any(character.isalpha() for word in words for character in word)


def _find_phrase_run(words: Sequence[str]) -> tuple[str, int] | None:
    """The phrase of more than `PHRASE_WORDS` words that most often stands in a row, at least `SENTENCE_COPIES` times.

    In such a run each n-gram last occurred one period ago, again and again.
    """
    last: dict[tuple[str, ...], int] = {}
    best: tuple[str, int] | None = None
    period = run = 0
    for place in range(len(words) - _SEED_WORDS + 1):
        seed = tuple(words[place : place + _SEED_WORDS])
        back = place - last[seed] if seed in last else 0
        last[seed] = place
        run = run + 1 if back and back == period else 1
        period = back
        copies = (run - 1 + _SEED_WORDS) // period + 1 if period > PHRASE_WORDS else 0
        if copies >= SENTENCE_COPIES and (best is None or copies > best[1]):
            end = place + _SEED_WORDS
            best = " ".join(words[end - period : end]), copies
    return best
