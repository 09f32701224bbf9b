"""Attention of packed documents, in blocks and together, equals torch's attention of each alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lory.models import fused_attention
from lory.models.fused_attention import Attention, Seen
from lory.models.fused_batches import group_documents
from lory.models.fused_prefixes import Run

SCALING = 0.3


def draw_row(seed: int) -> tuple[list[Tensor], Tensor, Seen]:
    """q, k and v of documents of 1 to 200 tokens, a gradient for the result, and who sees what."""
    chance = random.Random(seed)
    groups, shared, head_dim = chance.choice([1, 2, 3]), chance.choice([1, 2, 3]), chance.choice([4, 5, 8])
    lengths = [
        chance.choice([1, 2, chance.randint(1, 40), chance.randint(90, 200)]) for _ in range(chance.randint(1, 8))
    ]
    causal = chance.random() < 0.5
    window = chance.choice([None, None, 7, 97, 150]) if causal else None
    tokens, generator = sum(lengths), torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, head_dim, dtype=torch.float64, generator=generator)

    inputs = [draw(heads).requires_grad_() for heads in (groups * shared, groups, groups)]
    borders = tuple(itertools.accumulate(lengths, initial=0))
    return inputs, draw(groups * shared), Seen(borders, SCALING, window, causal=causal)


def attend_alone(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """torch's attention, document by document."""
    outputs = []
    for start, end in itertools.pairwise(seen.borders):
        steps = torch.arange(end - start)
        behind = steps[:, None] - steps
        visible = behind >= 0 if seen.causal else torch.ones_like(behind, dtype=torch.bool)
        if seen.window:
            visible &= behind < seen.window
        keys, values = (x[start:end].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
        queries = q[start:end].transpose(0, 1)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=seen.scaling)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("few", [0, 8_000, 10**9], ids=["in blocks", "as usual", "together"])
@pytest.mark.parametrize("seed", range(30))
def test_a_row_gives_what_each_document_gives_alone(seed: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "_FEW_SCORES", few)
    inputs, arriving, seen = draw_row(seed)
    expected = attend_alone(*inputs, seen)
    found = Attention.apply(*inputs, seen)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(out, inputs, arriving) for out in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_in_half_precision_it_is_as_exact_as_that_allows(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v, arriving = (torch.randn(260, 4, 32, dtype=torch.bfloat16) for _ in range(4))
    seen = Seen((0, 60, 61, 130, 260), 32**-0.5, causal=causal)
    halves = [x.requires_grad_() for x in (q, k, v)]
    wholes = [x.detach().double().requires_grad_() for x in (q, k, v)]
    found, expected = Attention.apply(*halves, seen), attend_alone(*wholes, seen)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)
    ours = torch.autograd.grad(found, halves, arriving)
    theirs = torch.autograd.grad(expected, wholes, arriving.double())
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_a_document_without_tokens_is_passed_over() -> None:
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64) for _ in range(3))
    seen = Seen((0, 0, 5, 5, 9, 9), SCALING)
    torch.testing.assert_close(Attention.apply(q, k, v, seen), attend_alone(q, k, v, Seen((0, 5, 9), SCALING)))


def test_a_large_image_is_cut_and_sees_all_of_itself() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1103, 2, 4, dtype=torch.float64) for _ in range(3))
    seen = Seen((0, 3, 1103), SCALING, causal=False)
    torch.testing.assert_close(Attention.apply(q, k, v, seen), attend_alone(q, k, v, seen))
    _, blocks = fused_attention._share_out(seen, 0, 96)
    assert max(alike.length for alike in blocks) == 96


def test_blocks_of_one_shape_go_together_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(44, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)]
    head = Run(2, 3)
    # the last two begin with three tokens of the second
    seen = Seen((0, 2, 16, 30, 37, 44), SCALING, before=((), (), (), (head,), (head,)))
    arriving = torch.randn(44, 6, 4, dtype=torch.float64)
    monkeypatch.setattr(fused_attention, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(fused_attention, "_FEW_SCORES", 0)
    results, calls = [], []
    for most in (1, 2 * 4 * 8, 10**6):
        monkeypatch.setattr(fused_attention, "_MOST_SCORES", most)
        fused_attention._share_out.cache_clear()
        _, blocks = fused_attention._share_out(seen, 0, 4)
        calls.append({(alike.length, alike.width): len(alike.firsts) for alike in blocks})
        assert max(len(alike.firsts) * alike.length * alike.width for alike in blocks) <= max(most, 4 * 14)
        out = Attention.apply(*inputs, seen)
        results.append((out, *torch.autograd.grad(out, inputs, arriving)))
    assert set(calls[0].values()) == {1}
    assert calls[2] == {(2, 2): 1, (4, 4): 2, (4, 8): 2, (4, 12): 2, (2, 14): 2, (4, 7): 2, (3, 10): 2}
    assert calls[1][4, 8] == 2
    for other in results[:2]:
        torch.testing.assert_close(other, results[2])
    torch.testing.assert_close(
        results[2][0][:30], attend_alone(*(x[:30] for x in inputs), Seen((0, 2, 16, 30), SCALING))
    )


def test_documents_of_like_lengths_go_together() -> None:
    ends = list(itertools.pairwise(itertools.accumulate([50, 4, 48, 5, 1, 49], initial=0)))
    batches = group_documents(ends, causal=True)
    assert [(batch.documents, batch.length) for batch in batches] == [(3, 50), (2, 5), (1, 1)]
    assert sorted(torch.cat([batch.tokens for batch in batches]).tolist()) == list(range(157))
    assert group_documents([], causal=False) == ()


def test_no_batch_is_too_large_for_memory() -> None:
    ends = list(itertools.pairwise(range(0, 100_001, 50)))
    batches = group_documents(ends, causal=True)
    assert sum(batch.documents for batch in batches) == len(ends)
    assert max(batch.documents * batch.length for batch in batches) <= 4096
