"""SimCTG's contrastive loss: the states of different tokens are pushed apart, so that greedy decoding has a choice.

After Su et al., "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417), section "Contrastive
Training". For one document x with states h_1 ... h_T and the cosine s,

    L_CL = 1 / (T * (T - 1)) * sum over i and j != i of max(0, margin - s(h_i, h_i) + s(h_i, h_j)),

where s(h_i, h_i) = 1. Its gradient with respect to the states of length 1 is a product of the 0/1 matrix of the pairs
above 1 - margin with these states, so it is computed along with the loss, some rows of the T x T cosines at a time.

Hand-computed: T = 3, margin 0.5, states (1, 0), (2, 0), (0, 3): the cosines are 1, 0, 0, of which only 1 is above
1 - 0.5; it brings 0.5, as (1, 2) and as (2, 1). L_CL = (0.5 + 0.5) / (3 * 2) = 1/6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lory.runtime import UsageError

CHUNK_ROWS = 512
"""Rows of a document's cosines that exist at a time: 512 x T x 4 bytes, 16 MB for 8,192 tokens."""


def contrastive_loss(
    hidden: Tensor,
    seq_lens: Tensor,
    margin: float = 0.5,
    counts: Sequence[int] | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Sum over documents of L_CL, and how many documents that is.

    The paper takes the mean over a document's pairs of tokens, then over the documents of a batch: the sum divided by
    the weight of all ranks and micro-batches is that mean. A document of one token has no pair and counts in neither.

    Args:
        hidden: (N, H) last hidden states of the documents, one after the other; padding is taken out before.
        seq_lens: (documents) lengths of the documents, adding up to N.
        margin: in [-1, 1]; pairs of tokens are pushed below a cosine of 1 - margin. The paper has 0.5.
        counts: how often each document is there, if not once: it is computed once and counts so much more.
        chunk_rows: rows of a document's cosines that exist at a time.

    Returns:
        () the sum, in fp32 or wider, with its gradient; a zero that keeps the graph where no document has a pair. And
        () the weight, the number of documents of two or more tokens, known without a forward pass.

    Raises:
        UsageError: `seq_lens` does not add up to N.
    """
    lengths = seq_lens.tolist()
    if sum(lengths) != len(hidden):
        raise UsageError(f"seq_lens adds up to {sum(lengths)}, but there are {len(hidden)} states.")
    states = F.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=1)
    # a document of one token has no pair
    times = [count * (length > 1) for count, length in zip(counts or [1] * len(lengths), lengths, strict=True)]
    loss: Tensor = _PairHinge.apply(states, lengths, times, margin, chunk_rows)
    return loss, torch.tensor(sum(times), device=hidden.device)


class _PairHinge(torch.autograd.Function):
    """Sum over documents, `times` each, of the mean over pairs of max(0, margin - 1 + u_i . u_j); every |u| is 1."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, lengths: list[int], times: list[int], margin: float, chunk_rows: int
    ) -> Tensor:
        gradient = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        loss = states.new_zeros(())
        begin = 0
        for length, count in zip(lengths, times, strict=True):
            document = slice(begin, begin + length)
            begin += length
            if not count:
                continue
            share = count / (length * (length - 1))
            own = states[document]
            for start in range(0, length, chunk_rows):
                rows = slice(start, min(start + chunk_rows, length))
                excess = torch.relu(own[rows] @ own.T + (margin - 1.0))
                excess.diagonal(start).zero_()
                loss += excess.sum() * share
                if gradient is not None:
                    # each pair stands in the sum as (i, j) and as (j, i)
                    gradient[document][rows] = (excess > 0).to(own.dtype) @ own * (2.0 * share)
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None
