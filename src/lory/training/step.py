"""One optimizer step: micro-batches in, one update out, every supervised token with the same weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lory.data.mixture.collate import Batch
from lory.models.attention import documents_apart
from lory.training.objective import Objective, Terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, over all ranks and micro-batches."""

    loss: float
    """Mean over the learnt tokens, in nats; with token-level unlikelihood that and the likelihood together."""
    token_accuracy: float
    grad_norm: float
    tokens: int
    """Tokens that went through the model."""
    supervised_tokens: int
    """Tokens that were learnt, those of folded samples as often as they are there."""
    parts: dict[str, float]
    """The losses beside the likelihood, each by its own weight: `token_unlikelihood` and `sequence_unlikelihood` a
    token, `divergence` a learnt token, `contrastive` a document."""


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
    draw: torch.Generator | None = None,
) -> StepResult:
    """Forward and backward over `batches` (this rank's micro-batches), then one update.

    Every micro-batch's loss sum is divided by the weight of all learnt tokens of all micro-batches of all ranks, so
    that the gradient does not depend on how the samples were spread over them. When the loss or the gradient is not
    finite, nothing is updated; the caller looks at the result.

    Args:
        draw: where the noise on the embeddings comes from, if there is to be any.
    """
    module: Objective = accelerator.unwrap_model(objective)
    totals = accelerator.reduce(_count(batches, accelerator.device), "sum")
    # the weights of messages may add up to less than 1
    weight, supervised, tokens, documents, continued = torch.where(totals > 0, totals, 1.0).tolist()
    # data parallelism averages gradients over the ranks; the sum is what is wanted
    ranks, config = accelerator.num_processes, module.config
    factors = _Factors(
        likelihood=ranks / weight,
        contrastive=config.contrastive.weight * ranks / documents,
        sequence=config.unlikelihood.sequence * ranks / continued,
        divergence=config.divergence * ranks / weight,
        continued_divergence=config.unlikelihood.divergence * ranks / continued,
    )
    with attention_for(module.model, batches[0]):
        sums = _accumulate(objective, batches, factors, accelerator, draw)
    shown = accelerator.reduce(sums, "sum").tolist()
    loss_sum, correct, unlikelihood, contrastive, divergence, sequence, departure = shown
    grad_norm = _clip(objective, max_grad_norm)
    if torch.isfinite(torch.tensor([*shown, grad_norm])).all():
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    found = {
        "token_unlikelihood": unlikelihood / weight if config.unlikelihood.token else None,
        "sequence_unlikelihood": sequence / continued if any(batch.continues for batch in batches) else None,
        "contrastive": contrastive / documents if config.contrastive.weight else None,
        "divergence": divergence / weight if config.divergence else None,
        "continued_divergence": departure / continued if config.unlikelihood.divergence else None,
    }
    return StepResult(
        loss=loss_sum / weight,
        token_accuracy=correct / weight,
        grad_norm=grad_norm,
        tokens=int(tokens),
        supervised_tokens=int(supervised) if totals[1] else 0,
        parts={name: value for name, value in found.items() if value is not None},
    )


class _Factors(NamedTuple):
    """What the sums of each loss are multiplied by."""

    likelihood: float
    contrastive: float
    sequence: float
    divergence: float
    continued_divergence: float


def _accumulate(
    objective: nn.Module,
    batches: Sequence[Batch],
    factors: _Factors,
    accelerator: Accelerator,
    draw: torch.Generator | None,
) -> Tensor:
    """Add up the gradients of this rank's micro-batches; (7) all terms, the continuations' two at the end."""
    sums = torch.zeros(7, dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            terms: Terms = objective(batch.to(accelerator.device), draw)
            if batch.continues:
                loss = terms.loss * factors.sequence + terms.divergence * factors.continued_divergence
            else:
                loss = terms.loss * factors.likelihood + terms.contrastive * factors.contrastive
                loss = loss + terms.divergence * factors.divergence
            accelerator.backward(loss)
        zero = torch.zeros(())
        ours = [terms.loss, terms.correct, terms.unlikelihood, terms.contrastive, terms.divergence]
        continued = [terms.loss, terms.divergence]
        shown = [zero] * 5 + continued if batch.continues else ours + [zero] * 2
        sums += torch.stack([value.detach().double().to(sums.device) for value in shown])
    return sums


def _count(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """(5) what the losses are divided by, and what is reported: weights, tokens, documents and continued tokens."""
    counts = [
        [0.0, 0, batch.tokens, 0, batch.learnt]
        if batch.continues
        else [batch.weight, batch.learnt, batch.tokens, batch.documents, 0]
        for batch in batches
    ]
    return torch.tensor(counts, dtype=torch.float64, device=device).sum(0)


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
                sums += torch.stack([value.double() for value in module(batch.to(accelerator.device))[:3]])
    finally:
        module.train(training)
    reduced: Tensor = accelerator.reduce(sums, "sum")
    return reduced
