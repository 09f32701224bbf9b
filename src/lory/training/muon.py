"""Muon for the matrices of hidden layers, AdamW for all else (Jordan 2024, "Muon: an optimizer for hidden layers").

A matrix moves in the direction of its momentum with all singular values brought near 1, so that rare directions are
learnt as fast as common ones. What that costs does not depend on the batch; with several processes each does it for a
share of the matrices and tells the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lory.training.masters import MasterAdamW

MATRICES = "matrices"
"""The key by which a parameter group says that Muon moves it."""
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonAdamW(MasterAdamW):
    """`MasterAdamW` in which groups with ``MATRICES: True`` are moved by Muon.

    The step of a matrix (A, B) is scaled by 0.2 sqrt(max(A, B)), which makes it as long as AdamW's, so that both share
    a learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2). A convolution's dimensions but the first are one.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, ns_steps: int = 5) -> None:
        """`ns_steps`: iterations of `orthogonalise`."""
        super().__init__(groups, lr)
        self.ns_steps = ns_steps

    def _update(self) -> None:
        self._move_matrices()
        # AdamW leaves alone what has no gradient
        super()._update()

    def _move_matrices(self) -> None:
        moved = [
            (group, parameter)
            for group in self.param_groups
            if group.get(MATRICES)
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        directions = [self._push(parameter) for _, parameter in moved]
        for (group, parameter), step in zip(moved, _orthogonalise_all(directions, self.ns_steps), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step.view_as(parameter), alpha=-group["lr"] * 0.2 * max(step.shape) ** 0.5)
            parameter.grad = None

    def _push(self, parameter: nn.Parameter) -> Tensor:
        """Add the gradient to the momentum; where that leads (Nesterov), (A, B)."""
        gradient = parameter.grad
        assert gradient is not None
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # AdamW, whose state this is a part of, looks for `step` when it is loaded
            state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(gradient))
        state["step"] += 1
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM).flatten(1)


def orthogonalise(matrix: Tensor, ns_steps: int = 5) -> Tensor:
    """The matrix (A, B) with singular values of 0.7 to 1.2 in place of all but its smallest ones, in bf16.

    Newton-Schulz iterations X <- a X + (b X X^T + c (X X^T)^2) X with the coefficients of the reference above.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.bfloat16()
    if tall := matrix.shape[0] > matrix.shape[1]:
        wide = wide.t()
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ns_steps):
        products = wide @ wide.t()
        wide = torch.addmm(wide, torch.addmm(products, products, products, beta=b, alpha=c), wide, beta=a)
    return wide.t() if tall else wide


def _orthogonalise_all(matrices: list[Tensor], ns_steps: int) -> list[Tensor]:
    """`orthogonalise` of each; all ranks have the same matrices, and each does its share."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [orthogonalise(matrix, ns_steps) for matrix in matrices]
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    found: list[Tensor] = [matrix.new_empty(matrix.shape, dtype=torch.bfloat16) for matrix in matrices]
    shares = deal([_count_products(matrix) for matrix in matrices], ranks)
    # before the first message, for which the others would wait
    for index in shares[rank]:
        found[index].copy_(orthogonalise(matrices[index], ns_steps))
    for owner, share in enumerate(shares):
        if not share:
            continue
        # in one message: a small one takes longer to begin than to send
        message = torch.cat([found[index].flatten() for index in share])
        distributed.broadcast(message, owner)
        for index, part in zip(share, message.split([found[i].numel() for i in share]), strict=True):
            found[index].copy_(part.view_as(found[index]))
    return found


def _count_products(matrix: Tensor) -> int:
    small, large = sorted(matrix.shape)
    return small * small * (2 * large + small)


def deal(costs: list[int], ranks: int) -> list[list[int]]:
    """Which rank does what: the dearest first, each to the rank that has least to do."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def find_matrices(model: nn.Module) -> set[int]:
    """The ids of the parameters that Muon is for: matrices and convolutions of hidden layers; not embeddings and the
    head, whose rows are tokens of their own, nor adapters on them."""
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if callable(head := getattr(model, "get_output_embeddings", None)) and (found := head()) is not None:
        outer.append(found)
    tokens = {id(parameter) for module in outer for parameter in module.parameters()}
    convolutions = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    return {
        id(parameter)
        for parameter in model.parameters()
        if (parameter.ndim == 2 or id(parameter) in convolutions) and id(parameter) not in tokens
    }
