"""NEFTune's noise: its size by each document's length, the same packed and padded, and the same again from a seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lory.losses.noise import add_embedding_noise
from lory.runtime import UsageError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def literal_noise(lengths: list[int], width: int, alpha: float) -> list[Tensor]:
    """Algorithm 1, document by document: e uniform in [-1, 1], X' - X = alpha / sqrt(L * d) * e."""
    generator = seeded()
    return [
        alpha / math.sqrt(length * width) * (2 * torch.rand(length, width, generator=generator) - 1)
        for length in lengths
    ]


@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 12, 5]])
def test_each_document_of_a_packed_row_has_noise_by_its_own_length(lengths: list[int]) -> None:
    embeddings = torch.randn(1, sum(lengths), 6)
    found = add_embedding_noise(embeddings, torch.tensor(lengths), 5.0, seeded())
    torch.testing.assert_close(found[0], embeddings[0] + torch.cat(literal_noise(lengths, 6, 5.0)))


def test_padded_documents_have_the_noise_of_packed_ones_and_padding_has_none() -> None:
    lengths = [3, 1, 12, 5]
    documents = [torch.randn(length, 6) for length in lengths]
    packed = add_embedding_noise(torch.cat(documents)[None], torch.tensor(lengths), 5.0, seeded())
    rows = pad_sequence(documents, batch_first=True, padding_value=9.0)
    padded = add_embedding_noise(rows, torch.tensor(lengths), 5.0, seeded())
    for row, length, part in zip(padded, lengths, packed[0].split(lengths), strict=True):
        assert torch.equal(row[:length], part)
        assert torch.equal(row[length:], torch.full_like(row[length:], 9.0))


def test_one_padded_row_is_told_from_a_packed_one() -> None:
    embeddings = torch.zeros(1, 5, 6)
    found = add_embedding_noise(embeddings, torch.tensor([3]), 5.0, seeded())
    torch.testing.assert_close(found[0, :3], literal_noise([3], 6, 5.0)[0])
    assert not found[0, 3:].any()


def test_the_noise_of_a_document_is_as_long_however_long_the_document() -> None:
    for length in (10, 1000):
        noise = add_embedding_noise(torch.zeros(1, length, 64), torch.tensor([length]), 5.0, seeded())
        assert noise.norm().item() == pytest.approx(5.0 / math.sqrt(3), rel=0.05)
        assert noise.abs().max() <= 5.0 / math.sqrt(length * 64)


def test_a_stored_generator_goes_on_where_it_was() -> None:
    embeddings, lengths = torch.zeros(1, 4, 3), torch.tensor([4])
    generator = seeded()
    add_embedding_noise(embeddings, lengths, 5.0, generator)
    state = generator.get_state()
    second = add_embedding_noise(embeddings, lengths, 5.0, generator)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert torch.equal(add_embedding_noise(embeddings, lengths, 5.0, resumed), second)
    assert not torch.equal(add_embedding_noise(embeddings, lengths, 5.0, resumed), second)


def test_torchs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    add_embedding_noise(torch.zeros(1, 4, 3), torch.tensor([4]), 5.0, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_pass_through_unchanged_in_the_embeddings_dtype() -> None:
    embeddings = torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    found = add_embedding_noise(embeddings, torch.tensor([4, 2]), 5.0, seeded())
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert torch.equal(embeddings.grad, torch.ones_like(embeddings))


@pytest.mark.parametrize(("shape", "lengths"), [((1, 5, 3), [2, 2]), ((2, 5, 3), [5]), ((2, 5, 3), [6, 1])])
def test_lengths_that_do_not_fit_are_refused(shape: tuple[int, ...], lengths: list[int]) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        add_embedding_noise(torch.zeros(shape), torch.tensor(lengths), 5.0, seeded())
