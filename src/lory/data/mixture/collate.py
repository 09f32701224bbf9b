"""Samples into a batch: documents one after the other in one row, or padded rows for models that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lory.types import IGNORE, Sample, SampleImage


@dataclass(frozen=True)
class Batch:
    """Tokens for one forward pass.

    Without padding, B is 1 and T the tokens of all documents; `attention_mask` is None. With padding, B is the number
    of documents and T the longest's length.
    """

    input_ids: Tensor
    """(B, T)"""
    targets: Tensor
    """(B, T) the token that each position is to predict, `IGNORE` where nothing is learnt."""
    seq_lens: Tensor
    """(documents) the documents' lengths."""
    attention_mask: Tensor | None = None
    """(B, T) 1 for real tokens."""
    weights: Tensor | None = None
    """(B, T) fp32, how much each target counts; None: 1 each."""
    counts: tuple[int, ...] | None = None
    """How often each document is there, if not once."""
    continues: bool = False
    """The documents are continuations that the model wrote itself; `weights` is 1 where they repeat themselves."""
    learnt: int = 0
    """How many tokens are learnt, those of a folded sample as often as it is there."""
    images: tuple[tuple[SampleImage, ...], ...] = ()
    """The images of each document."""
    pixels: Mapping[str, Tensor] | None = None
    """What the model's tower takes of `pixel_images`; None: it is not prepared."""
    pixel_images: tuple[SampleImage, ...] = ()
    """Those of `images` that the tower has to see."""

    @property
    def weight(self) -> float:
        """What all targets count together."""
        learnt = self.targets != IGNORE
        return float(learnt.sum() if self.weights is None else self.weights[learnt].sum(dtype=torch.float64))

    @property
    def documents(self) -> int:
        """How many documents have two tokens at least, folded ones as often as they are there."""
        counts = self.counts or (1,) * len(self.seq_lens)
        return sum(count for count, length in zip(counts, self.seq_lens.tolist(), strict=True) if length > 1)

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.seq_lens.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; `seq_lens` stays on the CPU, where it is read."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if field.name != "seq_lens" and isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def collate(
    samples: Sequence[Sample], padded: bool = False, pad_id: int = 0, counts: Sequence[int] | None = None
) -> Batch:
    """A batch of the samples, each a document of its own.

    Args:
        counts: how often each sample is there, if not once; it is computed once and counts so much more.
    """
    seq_lens = torch.tensor([len(sample) for sample in samples])
    ids = [torch.tensor(sample.input_ids) for sample in samples]
    # the label of the next token; the document's last token predicts nothing
    targets = [torch.tensor([*sample.labels[1:], IGNORE]) for sample in samples]
    times = tuple(counts or [1] * len(samples))
    images = tuple(sample.images for sample in samples)
    learnt = sum(count * sample.supervised for count, sample in zip(times, samples, strict=True))
    weights = None
    folded = any(count != 1 for count in times)
    if folded or any(sample.weights for sample in samples):
        weights = [_weigh(sample, count) for sample, count in zip(samples, times, strict=True)]
    if not padded:
        row = None if weights is None else torch.cat(weights)[None]
        batch = Batch(torch.cat(ids)[None], torch.cat(targets)[None], seq_lens, None, row)
        return replace(batch, counts=times if folded else None, learnt=learnt, images=images)
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=pad_id)
    mask = (torch.arange(input_ids.shape[1])[None] < seq_lens[:, None]).long()
    rows = None if weights is None else pad(weights, batch_first=True)
    batch = Batch(input_ids, pad(targets, batch_first=True, padding_value=IGNORE), seq_lens, mask, rows)
    return replace(batch, counts=times if folded else None, learnt=learnt, images=images)


def _weigh(sample: Sample, count: int) -> Tensor:
    """(T) how much the target of each position counts."""
    if sample.weights is None:
        return torch.full((len(sample),), float(count))
    return torch.tensor([*sample.weights[1:], 0.0]) * count
