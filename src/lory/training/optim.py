"""The optimizer and its learning-rate schedule, and the part of the config that sets them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lory.config import Section
from lory.models.kernels import KernelsName
from lory.training.masters import MasterAdamW
from lory.training.muon import MATRICES, MuonAdamW, find_matrices


class TrainConfig(Section):
    """The training run."""

    epochs: int = Field(3, ge=1, description="How often the data is gone through.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, whatever epochs says.")
    batch_size: int = Field(4, ge=1, description="Rows (packed) or samples (not packed) of a forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes to an optimizer step.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="How gradients become updates: adamw; or muon for the matrices of hidden layers and adamw for all "
        "else, which learns more from each step where training begins with random weights.",
    )
    ns_steps: int = Field(
        5,
        ge=1,
        le=10,
        description="Newton-Schulz iterations of muon; fewer are cheaper, which shows where batches are small.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate goes from its peak to 0 (constant: it stays)."
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises to its peak.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 is no limit.")
    seed: int = Field(0, ge=0, description="Seed of initialisation, order and dropout.")
    kernels: KernelsName = Field(
        "auto",
        description="What computes the elementwise parts of fused layers: auto (Liger's kernels on a GPU where they "
        "are installed, else plain operations), plain, compiled (by torch.compile, a minute at the start) or liger.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    log_every_steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    eval_every_steps: int = Field(500, ge=1, description="Optimizer steps between evaluations.")
    save_every_steps: int = Field(500, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="The newest checkpoints that are kept, beside the best.")
    early_stop_evals: int | None = Field(
        None, ge=1, description="Stop when so many evaluations in a row brought no lower loss."
    )


def build_optimizer(model: nn.Module, config: TrainConfig, lora_plus_ratio: float | None = None) -> MasterAdamW:
    """The optimizer of what is trainable, in fp32 whatever the weights are; vectors (norms, biases) are not decayed.

    Args:
        lora_plus_ratio: learning rate of adapters' B over that of the rest (Hayou et al. 2024, arXiv 2402.12354).
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    matrices = find_matrices(model) if config.optimizer == "muon" else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fast = lora_plus_ratio is not None and name.endswith("lora_B")
            kind = (is_fast, parameter.ndim <= 1, id(parameter) in matrices)
            groups.setdefault(kind, []).append(parameter)
    made = [
        {
            "params": groups[is_fast, is_vector, is_matrix],
            "weight_decay": 0.0 if is_vector else config.weight_decay,
            "lr": config.learning_rate * (lora_plus_ratio or 1.0 if is_fast else 1.0),
            MATRICES: is_matrix,
        }
        for is_fast, is_vector, is_matrix in sorted(groups)
    ]
    if matrices:
        return MuonAdamW(made, config.learning_rate, config.ns_steps)
    return MasterAdamW(made, config.learning_rate)


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """The learning rate as a function of the step alone."""
    from transformers import get_scheduler

    names = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    warmup_steps = round(config.warmup * total_steps)
    return get_scheduler(
        names[config.schedule], optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
