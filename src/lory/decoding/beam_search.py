"""Beam search: transformers' own, read as steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lory.decoding.loop import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def beam_steps(model: PreTrainedModel, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[Step]:
    """The likeliest continuation of each row that beam search finds, token by token.

    Which beam wins is known at the end only, so all of the work is done for the first step.

    Args:
        inputs: what `model.generate` takes as inputs: `input_ids` (B, T), padded on the left under an
            `attention_mask` (B, T), and whatever else belongs to the prompt.
        arguments: options of `model.generate`: `num_beams`, `eos_token_id` as a list, and others.
    """
    with torch.inference_mode():
        rows = model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = frozenset(arguments["eos_token_id"])
    lengths = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    for place in range(longest := max(lengths)):
        tokens = [row[place] if place < length else None for row, length in zip(rows, lengths, strict=True)]
        yield Step(tokens, finished=place == longest - 1)
