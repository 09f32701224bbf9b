"""Samples into a batch: documents one after the other in one row, or padded rows for models that need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lory.types import IGNORE, Sample


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

    @property
    def supervised(self) -> int:
        """How many positions are learnt."""
        return int((self.targets != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.seq_lens.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; `seq_lens` stays on the CPU, where it is read."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.input_ids.to(device), self.targets.to(device), self.seq_lens, mask)


def collate(samples: Sequence[Sample], padded: bool = False, pad_id: int = 0) -> Batch:
    """A batch of the samples, each a document of its own."""
    seq_lens = torch.tensor([len(sample) for sample in samples])
    ids = [torch.tensor(sample.input_ids) for sample in samples]
    targets = [_shift(sample) for sample in samples]
    if not padded:
        return Batch(torch.cat(ids)[None], torch.cat(targets)[None], seq_lens)
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=pad_id)
    mask = (torch.arange(input_ids.shape[1])[None] < seq_lens[:, None]).long()
    return Batch(input_ids, pad(targets, batch_first=True, padding_value=IGNORE), seq_lens, mask)


def _shift(sample: Sample) -> Tensor:
    """Targets: the label of the next token; the document's last token predicts nothing."""
    return torch.tensor([*sample.labels[1:], IGNORE])
