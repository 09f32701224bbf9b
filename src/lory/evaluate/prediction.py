"""How well a model predicts the supervised tokens of records: loss, accuracy, and repeats among its predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lory.adapters.prefix import packed_prefix, prefix_arguments
from lory.adapters.virtual_tokens import find_leading
from lory.data.mixture.collate import Batch, collate
from lory.data.mixture.packing import pack
from lory.evaluate.records import Record
from lory.metrics.prediction import PredictionCounts, predict_next
from lory.models.attention import document_arguments, documents_apart, keeps_documents_apart
from lory.models.head import split_head
from lory.types import IGNORE, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a packed row, or of a padded batch with its padding: a CPU is busy with a thousand already, and a GPU
# would idle over them
_CPU_TOKENS, _GPU_TOKENS = 1024, 8192
_NO_TOKEN = -1

Item = tuple[Record, Sample]


class Predictor:
    """Runs a model over given texts, documents apart: packed where the model allows it, else padded."""

    def __init__(self, model: PreTrainedModel, max_tokens: int, pad_id: int) -> None:
        """`max_tokens`: of the longest sample.

        Raises:
            UsageError: the model does something after its output head that is not known.
        """
        self.model, self.pad_id = model, pad_id
        self.body, self.head = split_head(model)
        self.packed = keeps_documents_apart(model, max_tokens)
        self.leading = find_leading(model, self.packed)
        self.device = model.get_input_embeddings().weight.device
        self.row_tokens = _CPU_TOKENS if self.device.type == "cpu" else _GPU_TOKENS

    @torch.no_grad()
    def measure(
        self, records: Sequence[Record], stopped: Callable[[], bool], progress: Callable[[int, int], None]
    ) -> PredictionCounts:
        """Counts over all supervised tokens, each of which counts one; each record's own are added to it.

        Logits exist for a few hundred positions at a time, never for all.

        Args:
            stopped: asked before each row; what was counted by then is returned.
            progress: called with (done, total) tokens.
        """
        counts = PredictionCounts()
        items = [(record, sample) for record in records for sample in record.samples]
        total, done = sum(len(sample) for _, sample in items), 0
        with documents_apart(self.model) if self.packed else contextlib.nullcontext():
            for row in self._rows(items):
                if stopped():
                    break
                self._measure_row(row, counts)
                done += sum(len(sample) for _, sample in row)
                progress(done, total)
        return counts

    def _rows(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        lengths = [len(sample) + len(self.leading) for _, sample in items]
        capacity = max(self.row_tokens, max(lengths, default=0))
        if self.packed:
            yield from ([items[index] for index in row] for row in pack(lengths, capacity))
            return
        row: list[Item] = []
        for index in sorted(range(len(items)), key=lengths.__getitem__):
            # in ascending order the newest is the longest, to which all are padded
            if row and (len(row) + 1) * lengths[index] > capacity:
                yield row
                row = []
            row.append(items[index])
        if row:
            yield row

    def _measure_row(self, row: Sequence[Item], counts: PredictionCounts) -> None:
        batch = collate([self.leading.prepend(sample) for _, sample in row], not self.packed, self.pad_id)
        on_device = batch.to(self.device)
        hidden = self._run(on_device)
        predictions, losses = predict_next(hidden, self.head, on_device.targets.flatten())
        parts = [batch.input_ids.flatten(), batch.targets.flatten(), predictions.cpu(), losses.cpu()]
        if batch.attention_mask is not None:
            real = batch.attention_mask.flatten().bool()
            parts = [part[real] for part in parts]
        ids, targets, predictions, losses = parts
        lengths = batch.seq_lens.tolist()
        if self.leading.ids:
            # a soft prompt's tokens are no text that could be repeated
            ids = torch.cat([_hide(document, len(self.leading)) for document in ids.split(lengths)])
        counts.add(ids, targets, predictions, losses, batch.seq_lens)
        documents = zip(row, *(part.split(lengths) for part in (targets, predictions, losses)), strict=True)
        for (record, _), target, prediction, loss in documents:
            record.supervised += int((target != IGNORE).sum())
            record.correct += int(((target != IGNORE) & (target == prediction)).sum())
            record.loss += float(loss.double().sum())

    def _run(self, batch: Batch) -> Tensor:
        """(B * T, H) hidden states."""
        if batch.attention_mask is None:
            arguments = document_arguments(batch.seq_lens, self.device) | packed_prefix(self.model)
        else:
            arguments = {"attention_mask": batch.attention_mask}
            arguments |= prefix_arguments(self.model, batch.attention_mask)
        # a cache would make the model forget where documents begin
        hidden: Tensor = self.body(input_ids=batch.input_ids, use_cache=False, **arguments).last_hidden_state
        return hidden.flatten(0, 1)


def _hide(ids: Tensor, count: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:count], _NO_TOKEN), ids[count:]])
