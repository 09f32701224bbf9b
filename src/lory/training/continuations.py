"""Continuations that the model writes while it is trained, for the sequence-level loss against repetition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lory.data.mixture.collate import Batch, collate
from lory.generate import GenerationOptions, generate_batch
from lory.losses.unlikelihood import repeated_ngram_mask
from lory.models import lean
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

    A chat is continued from its first prompt, a plain text from stretches of `prefix_tokens` at places that `draw`
    says. Where no sample is long enough to have a prefix, nothing is learnt from the batch.
    """
    prefixes = [prefix for sample in samples for prefix in _cut_prefixes(sample, config, draw)]
    chosen = [prefixes[number] for number in torch.randperm(len(prefixes), generator=draw)[: config.sequences].tolist()]
    answers = _continue(model, chosen, config, terminators) if chosen else []
    marked = [_mark(prefix, answer, config) for prefix, answer in zip(chosen, answers, strict=True)]
    # every rank has to run the same number of passes
    repeating = [sample for sample in marked if sample] or [Sample((terminators[0],) * 2, (IGNORE,) * 2, (0.0,) * 2)]
    leading = batching.leading
    batch = collate([leading.prepend(sample) for sample in repeating], batching.padded, batching.pad_id)
    # the loss is a mean over all that was written, also over what need not be run again
    return replace(batch, continues=True, learnt=sum(map(len, answers)))


def _continue(
    model: PreTrainedModel, prefixes: Sequence[Sequence[int]], config: UnlikelihoodConfig, terminators: Sequence[int]
) -> list[list[int]]:
    with _decoding(model):
        options = GenerationOptions(max_new_tokens=config.completion_tokens)
        return generate_batch(model, prefixes, options, terminators)


@contextlib.contextmanager
def _decoding(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode and arranged for decoding; afterwards each weight lies again as training wants it."""
    training, before = model.training, [(parameter, parameter.data) for parameter in model.parameters()]
    model.eval()
    try:
        lean.prepare_for_decoding(model)
        yield
    finally:
        model.__dict__.pop(lean.NAME, None)
        for parameter, data in before:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        model.train(training)


def _cut_prefixes(sample: Sample, config: UnlikelihoodConfig, draw: torch.Generator) -> list[list[int]]:
    """What of a sample may be continued: a chat's first prompt, or the stretches of a plain text, side by side."""
    first = next((place for place, label in enumerate(sample.labels) if label != IGNORE), 0)
    if first > 1:
        return [list(sample.input_ids[max(0, first - _LONGEST_PROMPT) : first])]
    size = config.prefix_tokens
    start = int(torch.randint(len(sample) % size + 1, (), generator=draw))
    return [list(sample.input_ids[at : at + size]) for at in range(start, len(sample) - size + 1, size)]


def _mark(prefix: Sequence[int], answer: Sequence[int], config: UnlikelihoodConfig) -> Sample | None:
    """The text up to its last repeated token; what comes after changes nothing. None where nothing is repeated."""
    ids = torch.tensor([answer], dtype=torch.long)
    repeated = repeated_ngram_mask(ids, config.ngram, last=config.penalize == "last")[0]
    if not repeated.any():
        return None
    end = int(repeated.nonzero().max()) + 1
    weights = (*[0.0] * len(prefix), *repeated[:end].float().tolist())
    return Sample((*prefix, *answer[:end]), (*[IGNORE] * len(prefix), *answer[:end]), weights)
