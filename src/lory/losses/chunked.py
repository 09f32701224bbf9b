"""Losses over the logits of a batch, a chunk of positions at a time, whose gradient to the logits is written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lory.losses.cross_entropy import Head, choose_chunk, split_evenly

Score = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(n, V) log-probabilities, which it may overwrite, the chunk's place among the positions, and whether a gradient is
wanted -> sums, the loss first, and the loss's gradient with respect to the logits."""


def score_chunks(
    hidden: Tensor, head: Head, score: Score, sums: int, parameters: Sequence[Tensor], chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Run `score` over the chunks of (N, H) states; logits exist for `chunk_tokens` positions at a time.

    Args:
        head: (n, H) -> (n, V) logits.
        sums: how many sums `score` gives.
        parameters: the head's own trainable tensors; they get a gradient, too.
        chunk_tokens: None: as many as suit the device.

    Returns:
        () the loss with its gradient, and (sums) all sums, the loss among them.
    """
    # inside of the function gradients are always off, so it cannot tell an evaluation itself
    trainable = [parameter for parameter in parameters if parameter.requires_grad and torch.is_grad_enabled()]
    size = split_evenly(len(hidden), choose_chunk(hidden, chunk_tokens))
    result: tuple[Tensor, Tensor] = _ChunkedScore.apply(hidden, head, score, sums, size, *trainable)
    return result


class _ChunkedScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, score: Score, sums: int, chunk_tokens: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        # added up in fp32 at least: in bf16 the sum over many chunks loses what single chunks bring
        grad_parameters = [torch.zeros_like(parameter, dtype=precise) for parameter in parameters] if needs_grad else []
        total = hidden.new_zeros(sums, dtype=precise)
        for start in range(0, len(hidden), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(needs_grad):
                states = hidden[here].detach().requires_grad_(needs_grad)
                logits = head(states)
            found, gradient = score(F.log_softmax(logits.detach(), dim=1, dtype=precise), here, needs_grad)
            total += found
            if grad_hidden is not None and gradient is not None:
                grads = torch.autograd.grad(logits, [states, *parameters], gradient.to(logits.dtype))
                grad_hidden[here] = grads[0]
                for whole, grad in zip(grad_parameters, grads[1:], strict=True):
                    whole += grad
        ctx.mark_non_differentiable(total)
        grad_parameters = [grad.to(p.dtype) for grad, p in zip(grad_parameters, parameters, strict=False)]
        ctx.save_for_backward(*([grad_hidden, *grad_parameters] if grad_hidden is not None else []))
        return total[0].clone(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # the loss is a sum, so its gradient only has to be scaled by what comes from above
        grad_hidden, *grad_parameters = (grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return grad_hidden, None, None, None, None, *grad_parameters
