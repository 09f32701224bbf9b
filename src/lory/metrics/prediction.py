"""How a model predicts next tokens of a given text: repeats among the predictions, perplexity, accuracy.

The measures are those of Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319),
section "Evaluation Metrics".
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor

from lory.metrics.repetition import WINDOWS
from lory.runtime import UsageError
from lory.types import IGNORE


@torch.no_grad()
def predict_next(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk_tokens: int = 256
) -> tuple[Tensor, Tensor]:
    """The most likely next token and the label's -log p, with the logits of a chunk of positions at a time.

    Args:
        hidden: (N, H) states, each of which predicts the label at its own index (already shifted).
        head: (n, H) -> (n, V) logits.
        labels: (N) token ids, `IGNORE` where nothing is predicted.

    Returns:
        (N) predictions, `IGNORE` where the label is, and (N) -log p of the labels in nats, fp32 or wider, 0 there.
    """
    predictions = torch.full_like(labels, IGNORE)
    losses = hidden.new_zeros(len(labels), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for positions in (labels != IGNORE).nonzero().squeeze(1).split(chunk_tokens):
        logits = head(hidden[positions]).to(losses.dtype)
        predictions[positions] = logits.argmax(1)
        losses[positions] = torch.nn.functional.cross_entropy(logits, labels[positions], reduction="none")
    return predictions, losses


class PredictionCounts:
    """Counts over the predictions of a data set, batch by batch; `scores` gives the measures.

    By hand: the document is 5 6 5 7, the predictions after its tokens are 5, 5, 6 (of which the targets are 6, 5, 7).
    Each is among the tokens before it, so rep/16 = 3/3; the second is right, so wrep/16 = 2/3; rep/1 = 1/3, as only
    the first is the token just before. Different predictions are 5 and 6: uniq = 2; accuracy = 1/3.
    """

    def __init__(self, windows: Sequence[int] = WINDOWS) -> None:
        """Count repeats within each of `windows` (the paper's l), in tokens, all 1 or more."""
        if not windows or min(windows) < 1:
            raise UsageError(f"The windows {list(windows)} were given for rep/l; give lengths of 1 or more tokens.")
        self.windows = tuple(sorted(set(windows)))
        self.predicted = self.correct = 0
        self.loss = 0.0
        self.repeats: Counter[tuple[str, int]] = Counter()
        self.different: set[int] = set()

    def add(self, input_ids: Tensor, labels: Tensor, predictions: Tensor, losses: Tensor, seq_lens: Tensor) -> None:
        """Count one batch.

        Args:
            input_ids: (N) the documents' tokens, one document after the other.
            labels: (N) the token after each, `IGNORE` where it is not counted.
            predictions: (N) what the model would have put there.
            losses: (N) -log p of the labels, in nats.
            seq_lens: (documents) lengths, adding up to N; a document's context is its own.
        """
        lengths = seq_lens.tolist()
        if sum(lengths) != len(input_ids):
            raise UsageError(f"seq_lens adds up to {sum(lengths)}, but there are {len(input_ids)} tokens.")
        rows = zip(input_ids.tolist(), labels.tolist(), predictions.tolist(), strict=True)
        for length in lengths:
            last_seen: dict[int, int] = {}
            for position, (token, label, prediction) in zip(range(length), rows, strict=False):
                last_seen[token] = position
                if label != IGNORE:
                    self._count(position + 1, label, prediction, last_seen)
        self.loss += float(losses[labels != IGNORE].double().sum())

    def _count(self, position: int, label: int, prediction: int, last_seen: dict[int, int]) -> None:
        self.predicted += 1
        self.correct += prediction == label
        self.different.add(prediction)
        # by the smallest window that reaches back far enough
        back = bisect_left(self.windows, position - last_seen.get(prediction, -math.inf))
        self.repeats["rep", back] += 1
        self.repeats["wrep", back] += prediction != label
        self.repeats["rep_human", bisect_left(self.windows, position - last_seen.get(label, -math.inf))] += 1

    def merge(self, other: PredictionCounts) -> None:
        """Add what another one counted, of another part of the data with the same windows."""
        if other.windows != self.windows:
            raise UsageError(f"Counts over the windows {other.windows} can't be added to those over {self.windows}.")
        self.predicted += other.predicted
        self.correct += other.correct
        self.loss += other.loss
        self.different |= other.different
        self.repeats.update(other.repeats)

    def scores(self) -> dict[str, float]:
        """The measures over all that was counted; empty if nothing was.

        ``rep/l``: the share of predictions that occur in the previous l tokens, for each window; ``wrep/l``: those
        that are wrong, too; ``rep_human/l``: the same for the text itself, which is what ``rep/l`` should come to.
        ``rep``, ``wrep``, ``rep_human``: the means over the windows. ``uniq``: how many different tokens were
        predicted. ``perplexity``: exp of the mean loss, inf where a float can't hold it. ``token_accuracy``: the share
        that is right.
        """
        total = self.predicted
        if not total:
            return {}
        scores: dict[str, float] = {}
        for measure in ("rep", "wrep", "rep_human"):
            counts = accumulate(self.repeats[measure, index] for index in range(len(self.windows)))
            each = {f"{measure}/{window}": count / total for window, count in zip(self.windows, counts, strict=True)}
            scores |= each | {measure: fmean(each.values())}
        mean_loss = self.loss / total
        return scores | {
            "uniq": float(len(self.different)),
            "perplexity": math.exp(mean_loss) if mean_loss < 709 else math.inf,
            "token_accuracy": self.correct / total,
        }
