"""Cross-entropy of a language model without ever holding all its logits.

The logits of a batch are its largest tensor by far (tokens x vocabulary, 49,152 for SmolLM2). They are made here for
the learnt positions only, a chunk at a time, and their gradient is taken at once, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lory.types import IGNORE

Head = Callable[[Tensor], Tensor]

# A chunk's fp32 logits take CHUNK_TOKENS x V x 4 bytes (25 MB for V = 49,152, 130 MB for V = 256,000), and then their
# gradient does, in their place; on a CPU larger chunks are no faster
CHUNK_TOKENS = 128
# An accelerator reads the whole head for each chunk, which a few rows do not pay for
ACCELERATOR_CHUNK_TOKENS = 1024


class LossSum(NamedTuple):
    """Sums over the learnt tokens, which the caller divides by the weight of all ranks and micro-batches."""

    loss: Tensor
    """() sum of -log p(token), with its gradient."""
    correct: Tensor
    """() the weight of the tokens that the model would have chosen itself; of several that are equally likely in fp32,
    each."""
    weight: Tensor
    """() the learnt tokens' weight: their number, where each counts 1."""


def cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    parameters: Sequence[Tensor] = (),
    chunk_tokens: int | None = None,
    weights: Tensor | None = None,
) -> LossSum:
    """Sum over learnt tokens of -log softmax(head(hidden))[label], each times its weight.

    Args:
        hidden: (N, H) states, each of which predicts the label at its own index (already shifted).
        head: (n, H) -> (n, V) logits, scaling and soft-capping included; they are overwritten.
        labels: (N) token ids, `IGNORE` where nothing is learnt.
        parameters: the head's own trainable tensors; they get a gradient, too.
        chunk_tokens: how many positions' logits exist at a time; None: as many as suit the device.
        weights: (N) fp32, how much each position counts; None: 1 each.

    Returns:
        The sums. Where nothing is learnt the loss is a zero that keeps the graph.
    """
    learnt = labels != IGNORE
    chosen, targets = hidden[learnt], labels[learnt]
    # inside of the function gradients are always off, so it cannot tell an evaluation itself
    trainable = [parameter for parameter in parameters if parameter.requires_grad and torch.is_grad_enabled()]
    counts = None if weights is None else weights[learnt]
    loss, correct = _ChunkedCrossEntropy.apply(
        chosen, targets, counts, head, split_evenly(len(chosen), choose_chunk(hidden, chunk_tokens)), *trainable
    )
    return LossSum(loss, correct, learnt.sum() if counts is None else counts.sum())


def choose_chunk(hidden: Tensor, chunk_tokens: int | None) -> int:
    """How many positions' logits exist at a time."""
    return chunk_tokens or (CHUNK_TOKENS if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_TOKENS)


def split_evenly(positions: int, most: int) -> int:
    """The size of equal chunks of at most so many positions: a few left over cost nearly as much as a whole chunk, for
    the head is read for them, too."""
    return max(1, -(-positions // max(1, -(-positions // most))))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        head: Head,
        chunk_tokens: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        precise = torch.promote_types(hidden.dtype, torch.float32)
        # added up in fp32 at least: in bf16 the sum over many chunks loses what single chunks bring
        grad_parameters = [torch.zeros_like(parameter, dtype=precise) for parameter in parameters] if needs_grad else []
        loss = hidden.new_zeros((), dtype=precise)
        correct = torch.zeros((), dtype=torch.long if weights is None else loss.dtype, device=hidden.device)
        for start in range(0, len(targets), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(needs_grad):
                states = hidden[here].detach().requires_grad_(needs_grad)
                logits = head(states)
            each, right, grad_logits = _score(logits.detach(), targets[here], needs_grad)
            loss += each.sum() if weights is None else (each * weights[here]).sum()
            correct += (right if weights is None else right * weights[here]).sum()
            if grad_hidden is not None and grad_logits is not None:
                if weights is not None:
                    grad_logits.mul_(weights[here, None])
                grads = torch.autograd.grad(logits, [states, *parameters], grad_logits)
                grad_hidden[here] = grads[0]
                for total, grad in zip(grad_parameters, grads[1:], strict=True):
                    total += grad
            del logits, grad_logits  # before the next chunk's come
        ctx.mark_non_differentiable(correct)
        grad_parameters = [grad.to(p.dtype) for grad, p in zip(grad_parameters, parameters, strict=False)]
        ctx.save_for_backward(*([grad_hidden, *grad_parameters] if grad_hidden is not None else []))
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # the loss is a sum, so its gradient only has to be scaled by what comes from above
        grad_hidden, *grad_parameters = (grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return grad_hidden, None, None, None, None, *grad_parameters


def _score(logits: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy of each row by few passes over the logits, the largest tensor there is.

    Args:
        logits: (n, V); overwritten where that saves memory.
        targets: (n) ids.

    Returns:
        (n) -log p(target) and (n) whether the target is the likeliest, in fp32 or higher; (n, V) the gradient of the
        first to the logits in their dtype, softmax - onehot, if it is needed.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    at = targets[:, None]
    whole = logits.dtype == precise
    top, own = logits.amax(-1, keepdim=True), logits.gather(1, at)
    # torch's argmax on a CPU takes as long as the softmax, the largest number a tenth of that; but in half precision
    # several tokens often share it
    right = own >= top if whole else logits.argmax(-1, keepdim=True) == at
    probabilities = torch.softmax(logits, -1, dtype=precise, out=logits if whole and logits.is_cpu else None)
    # the likeliest token's probability is at least 1 / V, so this logarithm of the sum does not suffer from underflow
    total = top.to(precise) - probabilities.amax(-1, keepdim=True).log()
    each, right = (total - own.to(precise)).squeeze(1), right.squeeze(1)
    if not needs_grad:
        return each, right, None
    probabilities.scatter_add_(1, at, probabilities.new_full(at.shape, -1.0))
    return each, right, probabilities.to(logits.dtype)
