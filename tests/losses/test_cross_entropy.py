"""The chunked loss equals torch's cross-entropy over all logits, in value and in every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.losses.cross_entropy import ACCELERATOR_CHUNK_TOKENS, CHUNK_TOKENS, choose_chunk, cross_entropy, split_evenly
from lory.types import IGNORE

WIDTH, VOCABULARY = 7, 31


def draw(tokens: int, ignored: float = 0.4, bias: bool = True) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states (N, H), a head and labels (N), in fp64."""
    torch.manual_seed(tokens)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    hidden = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (tokens,))
    labels[torch.rand(tokens) < ignored] = IGNORE
    return hidden, head, labels


@pytest.mark.parametrize("tokens", [1, 4, 47])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_over_all_logits(tokens: int, chunk_tokens: int, bias: bool) -> None:
    hidden, head, labels = draw(tokens, bias=bias)
    parameters = list(head.parameters())
    found = cross_entropy(hidden, head, labels, parameters, chunk_tokens)
    expected = F.cross_entropy(head(hidden), labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(found.loss, expected)
    # 1.7: the gradient from above is not always 1
    ours = torch.autograd.grad(1.7 * found.loss, [hidden, *parameters])
    theirs = torch.autograd.grad(1.7 * expected, [hidden, *parameters])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)
    assert found.weight == (labels != IGNORE).sum()
    assert found.correct == (head(hidden).argmax(-1) == labels).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_gradcheck(chunk_tokens: int) -> None:
    hidden, head, labels = draw(11)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def capped(states: Tensor) -> Tensor:
            return 2.0 * torch.tanh(F.linear(states, weight, bias) / 2.0)

        return cross_entropy(hidden, capped, labels, [weight, bias], chunk_tokens).loss

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels = draw(9)
    head.requires_grad_(False)
    cross_entropy(hidden, head, labels, list(head.parameters())).loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_a_trained_head_on_frozen_states() -> None:
    hidden, head, labels = draw(9)
    found = cross_entropy(hidden.detach(), head, labels, list(head.parameters()), 4)
    found.loss.backward()
    expected = F.cross_entropy(head(hidden.detach()), labels, reduction="sum")
    torch.testing.assert_close(head.weight.grad, torch.autograd.grad(expected, head.weight)[0])


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_learnt_is_a_zero_that_keeps_the_graph(tokens: int) -> None:
    hidden, head, labels = draw(tokens, ignored=1.1)
    found = cross_entropy(hidden, head, labels, list(head.parameters()))
    assert (found.loss.item(), found.correct.item(), found.weight.item()) == (0.0, 0, 0)
    found.loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_ignored_states_get_exactly_no_gradient() -> None:
    hidden, head, labels = draw(47)
    cross_entropy(hidden, head, labels, chunk_tokens=5).loss.backward()
    assert torch.equal(hidden.grad.abs().sum(-1) == 0, labels == IGNORE)


def test_bf16_states_are_summed_in_fp32() -> None:
    hidden, head, labels = draw(47)
    head = head.bfloat16().requires_grad_(False)
    states = hidden.detach().bfloat16().requires_grad_()
    found = cross_entropy(states, head, labels, chunk_tokens=10)
    logits = head(states.detach()).double()  # bf16's own rounding of the logits is not the loss's
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=0)
    factor = 1 / 3
    (found.loss * factor).backward()
    exact = torch.autograd.grad(factor * F.cross_entropy(head.double()(hidden), labels, reduction="sum"), hidden)[0]
    assert states.grad.dtype == torch.bfloat16
    assert (states.grad.double() - exact).norm() / exact.norm() < 0.02


def test_without_gradients_none_are_computed() -> None:
    hidden, head, labels = draw(9)
    calls: list[bool] = []

    def watched(states: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return head(states)

    with torch.no_grad():
        found = cross_entropy(hidden, watched, labels, list(head.parameters()), 4)
    assert calls == [False] * len(calls)
    assert not found.loss.requires_grad


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden, head, labels = draw(9)
    loss = cross_entropy(hidden, head, labels).loss
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_target_of_vanishing_probability_keeps_a_finite_loss() -> None:
    logits = torch.tensor([[300.0, 0.0, -400.0], [0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([2, 1])
    found = cross_entropy(logits, lambda states: states, labels)
    assert found.loss.item() == pytest.approx(700 + math.log(3))
    (ours,) = torch.autograd.grad(found.loss, logits)
    (theirs,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(ours, theirs)


def test_of_equal_logits_in_half_precision_the_first_is_the_choice() -> None:
    states = torch.tensor([[1.0, 20.0, 20.05], [1.0, 20.05, 20.0]]).bfloat16().requires_grad_()
    found = [cross_entropy(states, nn.Identity(), torch.tensor([label] * 2)).correct for label in range(3)]
    assert found == [0, 2, 0]


def test_a_chunk_suits_the_device_unless_its_size_is_given() -> None:
    # the meta device stands for an accelerator
    sizes = [choose_chunk(torch.empty(1, device=device), None) for device in ("cpu", "meta")]
    assert sizes == [CHUNK_TOKENS, ACCELERATOR_CHUNK_TOKENS]
    assert choose_chunk(torch.empty(1), 7) == 7


def test_chunks_are_of_equal_size() -> None:
    assert [split_evenly(positions, 128) for positions in (0, 1, 128, 129, 256, 531)] == [1, 1, 128, 65, 128, 107]
