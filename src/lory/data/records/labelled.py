"""Labelled texts, for classification and regression, with the columns that GLUE's tasks and the like have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lory.data.records.fields import Dropped, ReadOptions, check_text, is_blank, read_label
from lory.types import Conversation

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text",),
    ("sentence",),
)
"""What may be labelled; pairs stand first, since QNLI's hold the column of a single sentence."""


def read_classification(record: Mapping[str, Any], options: ReadOptions) -> Conversation:
    """The text, or the pair of texts, with its class.

    Raises:
        Dropped: there is no label, as in a test set.
    """
    label = read_label(record["label"], "label")
    columns = next(columns for columns in TEXT_COLUMNS if all(key in record for key in columns))
    texts = [check_text(record[key], key) for key in columns]
    if label is None:
        raise Dropped("no label")
    if any(is_blank(text) for text in texts):
        raise Dropped("empty text")
    if len(texts) == 1:
        return Conversation(text=texts[0], label=label)
    return Conversation(text=texts[0], text_pair=texts[1], label=label)
