"""Repeats among predictions agree with the paper's definitions taken literally."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lory.metrics.prediction import PredictionCounts, predict_next
from lory.metrics.repetition import WINDOWS
from lory.runtime import UsageError
from lory.types import IGNORE


def test_the_example_of_the_docstring() -> None:
    counts = PredictionCounts([1, 16])
    ids, labels = torch.tensor([5, 6, 5, 7]), torch.tensor([6, 5, 7, IGNORE])
    losses = torch.full((4,), math.log(8.0))
    counts.add(ids, labels, torch.tensor([5, 5, 6, 0]), losses, torch.tensor([4]))
    scores = counts.scores()
    assert scores["rep/16"] == 1.0
    assert scores["wrep/16"] == pytest.approx(2 / 3)
    assert scores["rep/1"] == pytest.approx(1 / 3)
    assert scores["rep"] == pytest.approx((1 + 1 / 3) / 2)
    # of the text's own 6, 5, 7 only the 5 stood before, two tokens back
    assert scores["rep_human/1"] == 0.0
    assert scores["rep_human/16"] == pytest.approx(1 / 3)
    assert scores["uniq"] == 2
    assert scores["token_accuracy"] == pytest.approx(1 / 3)
    assert scores["perplexity"] == pytest.approx(8.0)


def draw(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    total = sum(lengths)
    ids, predictions = torch.randint(60, (total,)), torch.randint(60, (total,))
    labels = ids.roll(-1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    labels[torch.rand(total) < 0.2] = IGNORE
    right = torch.rand(total) < 0.3
    return ids, labels, torch.where(right, labels, predictions), torch.rand(total), torch.tensor(lengths)


def test_equals_the_definitions_taken_literally() -> None:
    lengths = [1, 700, 3, 40]
    ids, labels, predictions, losses, seq_lens = draw(lengths)
    counts = PredictionCounts()
    counts.add(ids, labels, predictions, losses, seq_lens)
    scores = counts.scores()
    learnt = [t for t in range(len(ids)) if labels[t] != IGNORE]
    starts = [begin for begin, n in zip([0, 1, 701, 704], lengths, strict=True) for _ in range(n)]
    ids_, labels_, predictions_ = ids.tolist(), labels.tolist(), predictions.tolist()
    for window in WINDOWS:
        context = {t: ids_[max(starts[t], t + 1 - window) : t + 1] for t in learnt}
        rep = [predictions_[t] in context[t] for t in learnt]
        wrep = [predictions_[t] in context[t] and predictions_[t] != labels_[t] for t in learnt]
        human = [labels_[t] in context[t] for t in learnt]
        assert scores[f"rep/{window}"] == pytest.approx(sum(rep) / len(learnt))
        assert scores[f"wrep/{window}"] == pytest.approx(sum(wrep) / len(learnt))
        assert scores[f"rep_human/{window}"] == pytest.approx(sum(human) / len(learnt))
    for name in ("rep", "wrep", "rep_human"):
        assert scores[name] == pytest.approx(sum(scores[f"{name}/{window}"] for window in (16, 32, 128, 512)) / 4)
    assert scores["uniq"] == len({predictions_[t] for t in learnt})
    assert scores["perplexity"] == pytest.approx(math.exp(losses[labels != IGNORE].double().mean()))


def test_counts_of_parts_merge_into_the_counts_of_the_whole() -> None:
    ids, labels, predictions, losses, _ = draw([40, 25])
    whole, first, second = PredictionCounts(), PredictionCounts(), PredictionCounts()
    whole.add(ids, labels, predictions, losses, torch.tensor([40, 25]))
    first.add(ids[:40], labels[:40], predictions[:40], losses[:40], torch.tensor([40]))
    second.add(ids[40:], labels[40:], predictions[40:], losses[40:], torch.tensor([25]))
    first.merge(second)
    assert first.scores() == pytest.approx(whole.scores())


def test_nothing_counted_has_no_scores() -> None:
    assert PredictionCounts().scores() == {}


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    counts = PredictionCounts()
    one = torch.tensor([1, 1])
    counts.add(one, torch.tensor([1, IGNORE]), one, torch.tensor([1000.0, 0.0]), torch.tensor([2]))
    assert counts.scores()["perplexity"] == math.inf


def test_predict_next_gives_argmax_and_loss_of_labelled_positions_in_chunks() -> None:
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(4, 9), torch.randn(11, 4), torch.randint(9, (11,))
    labels[::3] = IGNORE
    sizes: list[int] = []

    def watched(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return head(states)

    predictions, losses = predict_next(hidden, watched, labels, chunk_tokens=3)
    logits = head(hidden)
    assert max(sizes) == 3
    assert torch.equal(predictions, torch.where(labels == IGNORE, IGNORE, logits.argmax(-1)))
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none").detach())
    assert not losses.requires_grad


def test_wrong_lengths_and_windows_are_refused() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(UsageError, match="adds up to 3, but there are 2 tokens"):
        PredictionCounts().add(ids, ids, ids, ids.float(), torch.tensor([3]))
    with pytest.raises(UsageError, match="windows"):
        PredictionCounts([0, 16])
    with pytest.raises(UsageError, match="can't be added"):
        PredictionCounts([16]).merge(PredictionCounts([32]))
