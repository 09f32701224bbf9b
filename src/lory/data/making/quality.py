"""What makes generated instructions and answers unfit to be learnt."""

from __future__ import annotations

import re

from lory.data.records.fields import is_fit
from lory.metrics.repetition import seq_rep_n
from lory.metrics.words import split_words

INSTRUCTION_WORDS = (3, 150)
"""Fewest and most words of an instruction, as in self-instruct (Wang et al. 2022, section 2.2); in scripts without
spaces, characters."""
MOST_REPETITION = 0.3
"""The largest share of 4-grams of words that repeat one before them."""

NO_TEXT = "characters that are no text"
_FEWEST_FOR_REPETITION = 16
_REFUSAL_CHARACTERS = 200
_REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b"
    r"|\bi('m| am) (just |only )?an? (ai|(large )?language model)\b"
    r"|\b(i('m| am) )?(sorry|afraid),?( but)? (that )?i (can't|cannot|can not|am unable|am not able|won't)\b"
    r"|\bi (can't|cannot|can not|am unable to|am not able to) (assist|help|fulfill|comply|provide|do that|access)\b"
    r"|作为(一个|一名)?(人工智能|AI|大?语言模型)|(抱歉|对不起)[，,]?\s*(但)?我(不能|无法)",
    re.IGNORECASE,
)
# what nothing can end with; code fences are counted
_UNFINISHED = re.compile(r"[,:;(\[{，：；、（「『-]\s*$")


def judge_instruction(text: str) -> str:
    """Why an instruction is unfit; empty if it is fit."""
    if not is_fit(text):
        return NO_TEXT
    words = split_words(text)
    fewest, most = INSTRUCTION_WORDS
    if not words:
        return "empty instruction"
    if len(words) < fewest:
        return "too short an instruction"
    if len(words) > most:
        return "too long an instruction"
    return "repetitive instruction" if _repeats(words) else ""


def judge_answer(question: str, answer: str, finish_reason: str, fewest_words: int, most_words: int) -> str:
    """Why an answer is unfit; empty if it is fit.

    Args:
        finish_reason: what the API said why the answer ended.
    """
    if finish_reason == "content_filter":
        return "answer stopped by the API's content filter"
    if not is_fit(answer):
        return NO_TEXT
    words = split_words(answer)
    if not answer.strip():
        return "empty answer"
    if finish_reason == "length":
        return "unfinished answer (--max-tokens)"
    if _REFUSAL.search(answer[:_REFUSAL_CHARACTERS].replace("’", "'")):
        return "refusal"
    if len(words) < fewest_words:
        return "too short an answer"
    if len(words) > most_words:
        return "too long an answer"
    if words == split_words(question) or answer.strip() == question.strip():
        return "answer equals its question"
    if _UNFINISHED.search(answer) or answer.count("```") % 2:
        return "unfinished sentence"
    return "repetitive answer" if _repeats(words) else ""


def _repeats(words: list[str]) -> bool:
    return len(words) >= _FEWEST_FOR_REPETITION and seq_rep_n(words, 4) > MOST_REPETITION
