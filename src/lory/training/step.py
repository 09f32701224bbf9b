"""One optimizer step: micro-batches in, one update out, every supervised token with the same weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lory.adapters.prefix import packed_prefix, prefix_arguments
from lory.data.collate import Batch
from lory.losses.cross_entropy import LossSum, cross_entropy
from lory.models.attention import document_arguments, documents_apart
from lory.models.head import split_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(nn.Module):
    """A model and its loss in one module, so that data parallelism wraps the whole of what is differentiated."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # kept out of the module's children: they are the model's own
        self._parts = [split_head(model)]

    def forward(self, batch: Batch) -> LossSum:
        """Sums over the learnt tokens of the batch."""
        body, head = self._parts[0]
        if batch.attention_mask is None:
            arguments = document_arguments(batch.seq_lens, batch.input_ids.device) | packed_prefix(self.model)
        else:
            arguments = {"attention_mask": batch.attention_mask}
            arguments |= prefix_arguments(self.model, batch.attention_mask)
        # a cache would make the model forget where documents begin
        hidden = body(input_ids=batch.input_ids, use_cache=False, **arguments).last_hidden_state
        parameters = list(head.linear.parameters())
        weights = None if batch.weights is None else batch.weights.flatten()
        return cross_entropy(hidden.flatten(0, 1), head, batch.targets.flatten(), parameters, weights=weights)


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, over all ranks and micro-batches."""

    loss: float
    """Mean over the learnt tokens, in nats."""
    token_accuracy: float
    grad_norm: float
    tokens: int
    """Tokens that went through the model."""
    supervised_tokens: int
    """Tokens that were learnt, those of folded samples as often as they are there."""


def attention_for(model: PreTrainedModel, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """The attention that such batches need: documents apart, or the model's own for padded ones."""
    return documents_apart(model) if batch.attention_mask is None else contextlib.nullcontext()


def train_step(
    objective: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    accelerator: Accelerator,
    max_grad_norm: float,
) -> StepResult:
    """Forward and backward over `batches` (this rank's micro-batches), then one update.

    Every micro-batch's loss sum is divided by the weight of all learnt tokens of all micro-batches of all ranks, so
    that the gradient does not depend on how the samples were spread over them. When the loss or the gradient is not
    finite, nothing is updated; the caller looks at the result.
    """
    model = accelerator.unwrap_model(objective).model
    device = accelerator.device
    counts = [[batch.weight, batch.learnt, batch.tokens] for batch in batches]
    totals = torch.tensor(counts, dtype=torch.float64, device=device).sum(0)
    weight, supervised, tokens = accelerator.reduce(totals, "sum").tolist()
    weight = weight or 1.0  # nothing is learnt: all sums are 0
    # data parallelism averages gradients over the ranks; the sum is what is wanted
    factor = accelerator.num_processes / weight
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with attention_for(model, batches[0]):
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(objective):
                result: LossSum = objective(batch.to(device))
                accelerator.backward(result.loss * factor)
            sums += torch.stack([result.loss.detach().double(), result.correct.double()])
    loss, correct = (accelerator.reduce(sums, "sum") / weight).tolist()
    grad_norm = _clip(objective, max_grad_norm)
    if torch.isfinite(torch.tensor([loss, grad_norm])).all():
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, correct, grad_norm, int(tokens), int(supervised))


def _clip(objective: nn.Module, max_grad_norm: float) -> float:
    """Scale the gradients down to `max_grad_norm` (0: leave them) and return the norm they had."""
    limit = max_grad_norm or float("inf")
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    return float(nn.utils.clip_grad_norm_(trainable, limit))


@torch.no_grad()
def evaluate_loss(objective: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> Tensor:
    """Sums over this rank's `batches`: (3) of loss, correct and learnt weight, in fp64, reduced over all ranks."""
    module = accelerator.unwrap_model(objective)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    training = module.training
    module.eval()
    try:
        with contextlib.ExitStack() as stack:
            for number, batch in enumerate(batches):
                if not number:
                    stack.enter_context(attention_for(module.model, batch))
                sums += torch.stack([value.double() for value in module(batch.to(accelerator.device))])
    finally:
        module.train(training)
    reduced: Tensor = accelerator.reduce(sums, "sum")
    return reduced
