"""The contrastive loss equals SimCTG's equation taken literally, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lory.losses.contrastive import contrastive_loss
from lory.runtime import UsageError


def literal_loss(hidden: Tensor, margin: float) -> Tensor:
    """L_CL of one document, pair by pair."""
    length = len(hidden)
    loss = hidden.sum() * 0.0
    for i in range(length):
        for j in range(length):
            if i != j:
                own, other = (F.cosine_similarity(hidden[i], hidden[k], dim=0) for k in (i, j))
                loss = loss + torch.clamp(margin - own + other, min=0.0)
    return loss / (length * (length - 1))


@pytest.mark.parametrize("lengths", [[2], [9], [1, 4, 1, 7, 2]])
@pytest.mark.parametrize("margin", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_equals_the_equation_taken_literally(lengths: list[int], margin: float, chunk_rows: int) -> None:
    torch.manual_seed(len(lengths))
    hidden = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    found, weight = contrastive_loss(hidden, torch.tensor(lengths), margin, chunk_rows=chunk_rows)
    expected = sum(literal_loss(part, margin) for part in hidden.split(lengths) if len(part) > 1)
    torch.testing.assert_close(found, expected)
    # 1.7: the gradient from above is not always 1
    torch.testing.assert_close(*(torch.autograd.grad(1.7 * loss, hidden)[0] for loss in (found, expected)))
    assert weight == sum(length > 1 for length in lengths)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: contrastive_loss(h, torch.tensor([5, 3]), chunk_rows=2)[0], hidden)


def test_the_example_of_the_docstring() -> None:
    hidden = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    loss, weight = contrastive_loss(hidden, torch.tensor([3]))
    assert loss.item() == pytest.approx(1 / 6)
    assert weight == 1


def test_equal_states_cost_the_margin_and_opposite_ones_nothing() -> None:
    same = torch.ones(4, 3)
    assert contrastive_loss(same, torch.tensor([4]), 0.5)[0].item() == pytest.approx(0.5)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert contrastive_loss(opposite, torch.tensor([2]), 0.5)[0] == 0


def test_documents_are_apart() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 3, dtype=torch.float64)
    together, weight = contrastive_loss(hidden, torch.tensor([4, 7]))
    alone = [contrastive_loss(part, torch.tensor([len(part)])) for part in hidden.split([4, 7])]
    torch.testing.assert_close(together, alone[0][0] + alone[1][0])
    assert weight == alone[0][1] + alone[1][1]


def test_a_document_that_is_there_twice_is_computed_once_and_counts_twice() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    folded = contrastive_loss(hidden, torch.tensor([4, 7, 1]), counts=[2, 1, 3])
    twice = contrastive_loss(torch.cat([hidden[:4], hidden]), torch.tensor([4, 4, 7, 1]))
    assert folded[1] == twice[1] == 3
    torch.testing.assert_close(folded[0], twice[0])
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss, _ in (folded, twice)))


def test_documents_of_one_token_are_a_zero_that_keeps_the_graph() -> None:
    hidden = torch.randn(2, 3, requires_grad=True)
    loss, weight = contrastive_loss(hidden, torch.tensor([1, 1]))
    assert (loss.item(), weight.item()) == (0.0, 0)
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_compared_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = (100 * torch.randn(9, 5)).to(dtype).requires_grad_()
    loss, _ = contrastive_loss(hidden, torch.tensor([9]))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), literal_loss(hidden.detach().double(), 0.5), rtol=1e-5, atol=1e-7)
    assert hidden.grad.dtype == dtype
    assert hidden.grad.isfinite().all()


def test_a_state_of_zeros_is_like_no_other() -> None:
    hidden = torch.zeros(3, 4, requires_grad=True)
    loss, _ = contrastive_loss(hidden, torch.tensor([3]))
    loss.backward()
    assert loss == 0
    assert hidden.grad.isfinite().all()


def test_what_is_kept_for_the_backward_pass_grows_with_the_tokens_alone() -> None:
    def kept(tokens: int) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        hidden = torch.randn(tokens, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            contrastive_loss(hidden, torch.tensor([tokens]), chunk_rows=8)
        return sum(sizes)

    assert kept(200) < 2.1 * kept(100)
    assert kept(200) < 200 * 200


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="adds up to 3, but there are 4 states"):
        contrastive_loss(torch.ones(4, 2), torch.tensor([3]))
