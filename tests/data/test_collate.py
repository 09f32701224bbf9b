"""A batch holds every document once, predicts each token from the one before, and never across documents."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lory.data.mixture.collate import collate
from lory.types import IGNORE, Sample

SAMPLES = [
    Sample((5, 6, 7), (IGNORE, 6, 7)),
    Sample((8, 9), (8, 9)),  # the first token is not learnt even where it has a label
    Sample((1, 2, 3, 4, 5), (IGNORE, IGNORE, IGNORE, 4, IGNORE)),
]


def test_without_padding_documents_follow_each_other_in_one_row() -> None:
    batch = collate(SAMPLES)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 5]]
    assert batch.targets.tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE, 4, IGNORE, IGNORE]]
    assert batch.seq_lens.tolist() == [3, 2, 5]
    assert batch.attention_mask is None


def test_with_padding_each_document_has_a_row() -> None:
    batch = collate(SAMPLES, padded=True, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 99, 99], [8, 9, 99, 99, 99], [1, 2, 3, 4, 5]]
    assert batch.targets.tolist() == [
        [6, 7, IGNORE, IGNORE, IGNORE],
        [9, IGNORE, IGNORE, IGNORE, IGNORE],
        [IGNORE, IGNORE, 4, IGNORE, IGNORE],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.seq_lens.tolist() == [3, 2, 5]


@pytest.mark.parametrize("padded", [False, True])
def test_counts_and_types_do_not_depend_on_the_layout(padded: bool) -> None:
    batch = collate(SAMPLES, padded)
    assert batch.tokens == sum(len(sample) for sample in SAMPLES) == 10
    assert batch.weight == batch.learnt == sum(sample.supervised for sample in SAMPLES) == 4
    assert batch.input_ids.dtype == batch.targets.dtype == batch.seq_lens.dtype == torch.int64
    assert batch.input_ids.shape == batch.targets.shape


def test_a_padding_token_that_is_also_a_real_one_is_masked_by_length() -> None:
    batch = collate([Sample((7, 7), (7, 7)), Sample((7, 1, 7), (7, 1, 7))], padded=True, pad_id=7)
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.targets.tolist() == [[7, IGNORE, IGNORE], [1, 7, IGNORE]]


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_moves_whole_but_for_its_lengths(padded: bool) -> None:
    batch = collate(SAMPLES, padded, counts=[1, 2, 1]).to(torch.device("meta"))
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    assert batch.learnt == 5
    assert tensors.pop("seq_lens").tolist() == [3, 2, 5]
    assert ("attention_mask" in tensors) == padded
    assert {tensor.device.type for tensor in tensors.values() if tensor is not None} == {"meta"}
    assert batch.weights is not None
