"""The divergence equals its formula written out over all logits, in value and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lory.losses.divergence import divergence
from lory.types import IGNORE

WIDTH, VOCABULARY = 7, 13


def draw(count: int, ignored: float = 0.3) -> tuple[Tensor, nn.Linear, Tensor, nn.Linear, Tensor, Tensor]:
    """States (N, H) and a head of the model, the same of the one before it, labels (N) and weights (N), in fp64."""
    torch.manual_seed(count)
    head, before = nn.Linear(WIDTH, VOCABULARY).double(), nn.Linear(WIDTH, VOCABULARY).double()
    hidden = (3 * torch.randn(count, WIDTH, dtype=torch.float64)).requires_grad_()
    reference = 3 * torch.randn(count, WIDTH, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (count,))
    labels[torch.rand(count) < ignored] = IGNORE
    return hidden, head, reference, before, labels, torch.rand(count)


def literal(p: Tensor, q: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over learnt positions and all tokens of q * log(q / p), term by term."""
    total = p.sum() * 0.0
    for t, label in enumerate(labels.tolist()):
        if label != IGNORE:
            for k in range(VOCABULARY):
                total = total + weights[t] * q[t, k] * torch.log(q[t, k] / p[t, k])
    return total


@pytest.mark.parametrize("count", [1, 2, 31])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_equals_the_formula_taken_literally(count: int, chunk_tokens: int, weighted: bool) -> None:
    hidden, head, reference, before, labels, weights = draw(count)
    given = weights if weighted else None
    found = divergence(hidden, head, reference, before, labels, list(head.parameters()), chunk_tokens, given)
    p, q = head(hidden).softmax(-1), before(reference).softmax(-1).detach()
    expected = literal(p, q, labels, weights if weighted else torch.ones(count))
    torch.testing.assert_close(found, expected)
    inputs = [hidden, *head.parameters()]
    ours, theirs = torch.autograd.grad(2.5 * found, inputs), torch.autograd.grad(2.5 * expected, inputs)
    torch.testing.assert_close(ours, theirs)


def test_by_hand() -> None:
    def head(states: Tensor) -> Tensor:
        return states

    half, quarter = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    found = divergence(quarter, head, half, head, torch.tensor([0]))
    assert found.item() == pytest.approx(math.log(2.0) - math.log(3.0) / 2.0)


def test_without_a_change_it_is_zero_and_so_is_its_gradient() -> None:
    hidden, head, _, _, labels, _ = draw(9)
    found = divergence(hidden, head, hidden, head, labels)
    found.backward()
    assert found.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_where_nothing_is_learnt_it_is_a_zero_with_a_gradient() -> None:
    hidden, head, reference, before, labels, _ = draw(5)
    found = divergence(hidden, head, reference, before, torch.full_like(labels, IGNORE))
    found.backward()
    assert found.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_finite_in_half_precision_and_for_impossible_tokens(dtype: torch.dtype) -> None:
    def head(states: Tensor) -> Tensor:
        return states

    before = torch.tensor([[60.0, 0.0, -60.0], [5.0, 4.0, -torch.inf]], dtype=dtype)
    after = torch.tensor([[-60.0, 0.0, 60.0], [4.0, 5.0, -torch.inf]], dtype=dtype, requires_grad=True)
    found = divergence(after, head, before, head, torch.tensor([0, 1]))
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(120.0 + (math.e - 1) / (math.e + 1), rel=1e-3)
    assert after.grad is not None
    assert after.grad.isfinite().all()
