"""Continuations that the model writes while it is trained, for the sequence-level loss against repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lory.data.mixture.collate import Batch, collate
from lory.generate import GenerationOptions, generate_batch
from lory.losses.unlikelihood import repeated_ngram_mask
from lory.training.objective import UnlikelihoodConfig
from lory.types import IGNORE, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lory.training.feed import Batching

_LONGEST_PROMPT = 512
"""A chat's prompt is cut at its beginning to so many tokens: what is repeated is in the answer."""


def is_sequence_step(config: UnlikelihoodConfig, seed: int, step: int) -> bool:
    """Whether the model continues texts in this step: a share `sequence_rate` of all, spread evenly.

    The first of them is drawn by the seed, so that it is a function of seed and step alone.
    """
    start = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    return int((step + start + 1) * config.sequence_rate) > int((step + start) * config.sequence_rate)


def continue_texts(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    batching: Batching,
    config: UnlikelihoodConfig,
    terminators: Sequence[int],
    draw: torch.Generator,
) -> Batch:
    """Greedy continuations of some of the samples, as a batch whose weights are 1 where they repeat themselves.

    A chat is continued from its first prompt, a plain text from `prefix_tokens` at a place that `draw` says.

    Where no sample is long enough to have a prefix, nothing is learnt from the batch.
    """
    prefixes = [prefix for sample in samples if (prefix := _cut_prefix(sample, config, draw))]
    chosen = [prefixes[number] for number in torch.randperm(len(prefixes), generator=draw)[: config.sequences].tolist()]
    continued = _continue(model, chosen, config, terminators) if chosen else []
    if not continued:
        # every rank has to run the same number of passes
        continued = [Sample((terminators[0],) * 2, (IGNORE,) * 2, (0.0,) * 2)]
    leading = batching.leading
    batch = collate([leading.prepend(sample) for sample in continued], batching.padded, batching.pad_id)
    return replace(batch, continues=True)


def _continue(
    model: PreTrainedModel, prefixes: Sequence[Sequence[int]], config: UnlikelihoodConfig, terminators: Sequence[int]
) -> list[Sample]:
    training = model.training
    model.eval()
    try:
        options = GenerationOptions(max_new_tokens=config.completion_tokens)
        answers = generate_batch(model, prefixes, options, terminators)
    finally:
        model.train(training)
    pairs = zip(prefixes, answers, strict=True)
    return [_mark(prefix, answer, config.ngram) for prefix, answer in pairs if answer]


def _cut_prefix(sample: Sample, config: UnlikelihoodConfig, draw: torch.Generator) -> list[int]:
    first = next((place for place, label in enumerate(sample.labels) if label != IGNORE), 0)
    if first > 1:
        return list(sample.input_ids[max(0, first - _LONGEST_PROMPT) : first])
    room = len(sample) - config.prefix_tokens
    if room < 0:
        return []
    start = int(torch.randint(room + 1, (), generator=draw))
    return list(sample.input_ids[start : start + config.prefix_tokens])


def _mark(prefix: Sequence[int], answer: Sequence[int], ngram: int) -> Sample:
    repeated = repeated_ngram_mask(torch.tensor([answer]), ngram)[0].tolist()
    weights = (*[0.0] * len(prefix), *map(float, repeated))
    return Sample((*prefix, *answer), (*[IGNORE] * len(prefix), *answer), weights)
