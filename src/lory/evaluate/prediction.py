"""How well a model predicts the supervised tokens of records: loss, accuracy, and repeats among its predictions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lory.adapters.prefix import packed_prefix, prefix_arguments
from lory.adapters.virtual_tokens import find_leading
from lory.data.encoding.pictures import reopen
from lory.data.mixture.collate import Batch, collate
from lory.data.mixture.packing import pack
from lory.evaluate.records import Record
from lory.metrics.prediction import PredictionCounts, predict_next
from lory.models.attention import document_arguments, documents_apart, keeps_documents_apart
from lory.models.head import split_head
from lory.types import IGNORE, Sample, SampleImage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lory.data.vision.reader import ImageReader

# Tokens of a packed row, or of a padded batch with its padding: a CPU is busy with a thousand already, and a GPU
# would idle over them
_CPU_TOKENS, _GPU_TOKENS = 1024, 8192
_NO_TOKEN = -1

Item = tuple[Record, Sample]


@dataclass
class Totals:
    """What was measured over several records: sums in which each token has the weight of its message, and counts."""

    counts: PredictionCounts = field(default_factory=PredictionCounts)
    """Of tokens, each of which counts one."""
    loss: float = 0.0
    correct: float = 0.0
    weight: float = 0.0

    def merge(self, other: Totals) -> None:
        """Add what was measured over other records."""
        self.counts.merge(other.counts)
        self.loss += other.loss
        self.correct += other.correct
        self.weight += other.weight

    def scores(self) -> dict[str, float]:
        """`tokens`, mean `loss` in nats, `perplexity`, `token_accuracy`, and the repeats of `PredictionCounts.scores`.

        The means are over the weights, as in training; without a message that has one, each token's is 1.
        """
        if not self.weight:
            return {"tokens": self.counts.predicted}
        loss = self.loss / self.weight
        return {
            "tokens": self.counts.predicted,
            "loss": loss,
            **self.counts.scores(),
            "perplexity": math.exp(loss) if loss < 709 else math.inf,
            "token_accuracy": self.correct / self.weight,
        }


class Predictor:
    """Runs a model over given texts, documents apart: packed where the model allows it, else padded.

    What has images goes through the model by itself, as a prompt does when it is answered.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int, pad_id: int, reader: ImageReader | None = None) -> None:
        """`max_tokens`: of the longest sample; `reader`: of a model that sees.

        Raises:
            UsageError: the model does something after its output head that is not known.
        """
        self.model, self.pad_id, self.reader = model, pad_id, reader
        self.body, self.head = split_head(model)
        self.packed = keeps_documents_apart(model, max_tokens)
        self._leading = {packed: find_leading(model, packed) for packed in (True, False)}
        self.device = model.get_input_embeddings().weight.device
        self.row_tokens = _CPU_TOKENS if self.device.type == "cpu" else _GPU_TOKENS

    @torch.no_grad()
    def measure(
        self, records: Sequence[Record], stopped: Callable[[], bool], progress: Callable[[int, int], None]
    ) -> Totals:
        """Sums over all supervised tokens; each record's own are added to it.

        Logits exist for a few hundred positions at a time, never for all.

        Args:
            stopped: asked before each row; what was counted by then is returned.
            progress: called with (done, total) tokens.
        """
        totals = Totals()
        items = [(record, sample) for record in records for sample in record.samples]
        total, done = sum(len(sample) for _, sample in items), 0
        texts = [item for item in items if not item[1].images]
        seen = [item for item in items if item[1].images]
        for packed, rows in ((self.packed, self._rows(texts)), (False, ([item] for item in seen))):
            with documents_apart(self.model) if packed else contextlib.nullcontext():
                for row in rows:
                    if stopped():
                        return totals
                    self._measure_row(row, packed, totals)
                    done += sum(len(sample) for _, sample in row)
                    progress(done, total)
        return totals

    def _rows(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        lengths = [len(sample) + len(self._leading[self.packed]) for _, sample in items]
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

    def _measure_row(self, row: Sequence[Item], packed: bool, totals: Totals) -> None:
        leading = self._leading[packed]
        batch = collate([leading.prepend(sample) for _, sample in row], not packed, self.pad_id)
        on_device = batch.to(self.device)
        hidden = self._run(on_device, row[0][1].images)
        predictions, losses = predict_next(hidden, self.head, on_device.targets.flatten())
        weights = torch.ones(batch.targets.shape) if batch.weights is None else batch.weights
        parts = [batch.input_ids, batch.targets, predictions.cpu(), losses.cpu(), weights]
        parts = [part.flatten() for part in parts]
        if batch.attention_mask is not None:
            real = batch.attention_mask.flatten().bool()
            parts = [part[real] for part in parts]
        ids, targets, predictions, losses, weights = parts
        lengths = batch.seq_lens.tolist()
        if leading.ids:
            # a soft prompt's tokens are no text that could be repeated
            ids = torch.cat([_hide(document, len(leading)) for document in ids.split(lengths)])
        totals.counts.add(ids, targets, predictions, losses, batch.seq_lens)
        documents = zip(row, *(part.split(lengths) for part in (targets, predictions, losses, weights)), strict=True)
        for (record, _), target, prediction, loss, weight in documents:
            _add(record, totals, target, prediction, loss, weight.double() * (target != IGNORE))

    def _run(self, batch: Batch, images: Sequence[SampleImage]) -> Tensor:
        """(B * T, H) hidden states; where there are images, B is 1 and they are all of the row's."""
        if batch.attention_mask is None:
            arguments = document_arguments(batch.seq_lens, self.device) | packed_prefix(self.model)
        else:
            arguments = {"attention_mask": batch.attention_mask}
            arguments |= prefix_arguments(self.model, batch.attention_mask)
        if images and self.reader is not None:
            inputs = self.reader.see([reopen(image) for image in images]).inputs
            inputs = {**inputs, **self.reader.kinds(batch.input_ids[0].tolist())}
            arguments |= {name: self._place(value) for name, value in inputs.items()}
        # a cache would make the model forget where documents begin
        hidden: Tensor = self.body(input_ids=batch.input_ids, use_cache=False, **arguments).last_hidden_state
        return hidden.flatten(0, 1)

    def _place(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.model.dtype if value.is_floating_point() else None)


def _hide(ids: Tensor, count: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:count], _NO_TOKEN), ids[count:]])


def _add(record: Record, totals: Totals, targets: Tensor, predictions: Tensor, losses: Tensor, weights: Tensor) -> None:
    """Add one document's tokens, (T) each, to the record and to the whole."""
    record.supervised += int((targets != IGNORE).sum())
    loss = float((losses.double() * weights).sum())
    correct = float(((targets == predictions) * weights).sum())
    weight = float(weights.sum())
    for sums in (record, totals):
        sums.loss += loss
        sums.correct += correct
        sums.weight += weight
