"""Muon: as torch's own, whatever the precision and however many processes share the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from lory.training.masters import MASTER
from lory.training.muon import MATRICES, MuonAdamW, deal, find_matrices, orthogonalise
from lory.training.optim import TrainConfig, build_optimizer

SHAPES = ((5, 3), (4, 9), (6, 2, 3, 1), (7,))


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator).bfloat16().to(dtype)) for shape in SHAPES]


def make_optimizer(parameters: list[nn.Parameter], ns_steps: int = 5) -> MuonAdamW:
    groups: list[dict[str, Any]] = [
        {"params": parameters[:3], "weight_decay": 0.1, MATRICES: True},
        {"params": parameters[3:], "weight_decay": 0.0, MATRICES: False},
    ]
    return MuonAdamW(groups, 1e-2, ns_steps)


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("ns_steps", [5, 3])
def test_it_is_torchs_muon_and_adamw_side_by_side(ns_steps: int) -> None:
    ours, theirs = make_parameters(), make_parameters()
    # torch's takes no convolutions: the same numbers as a matrix
    flat = [nn.Parameter(p.detach().flatten(1)) for p in theirs[:3]]
    muon = torch.optim.Muon(flat, lr=1e-2, weight_decay=0.1, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=1e-2, weight_decay=0.0)
    optimizer = make_optimizer(ours, ns_steps)
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for matrix, parameter in zip(flat, theirs, strict=False):
            assert parameter.grad is not None
            matrix.grad = parameter.grad.flatten(1)
        optimizer.step()
        muon.step()
        adamw.step()
    for matrix, parameter in zip(flat, ours, strict=False):
        torch.testing.assert_close(parameter.flatten(1), matrix)
    torch.testing.assert_close(ours[3], theirs[3], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 64), (31, 123), (123, 31)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.t() @ orthogonalise(matrix).float() @ v.t()
    diagonal = turned.diagonal()
    # the smallest ones of a square matrix are not there yet after five iterations
    assert (diagonal > 0).all()
    assert ((diagonal > 0.6) & (diagonal < 1.25)).float().mean() > 0.95
    assert (turned - diagonal.diag()).abs().max() < 0.05


def test_half_precision_has_masters() -> None:
    half, full = make_parameters(torch.bfloat16), make_parameters()
    optimizer = make_optimizer(half)
    take_steps(optimizer, half, range(20))
    take_steps(make_optimizer(full), full, range(20))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half, full, strict=True))
    assert all(MASTER in values for values in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_uninterrupted(dtype: torch.dtype) -> None:
    whole = make_parameters(dtype)
    optimizer = make_optimizer(whole)
    take_steps(optimizer, whole, range(3))
    state = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer.state_dict()["state"].items()}
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    take_steps(optimizer, whole, range(3, 9))
    other = make_optimizer(resumed)
    other.load_state_dict({"state": state, "param_groups": other.state_dict()["param_groups"]})
    take_steps(other, resumed, range(3, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_without_a_gradient_a_matrix_stays() -> None:
    parameters = make_parameters()
    before = parameters[0].detach().clone()
    optimizer = make_optimizer(parameters)
    give_gradients(parameters, 0)
    parameters[0].grad = None
    optimizer.step()
    assert torch.equal(parameters[0], before)
    assert not torch.equal(parameters[1], make_parameters()[1])


def _share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parameters = make_parameters()
    take_steps(make_optimizer(parameters), parameters, range(4))
    torch.save([p.detach() for p in parameters], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_share, (str(tmp_path),), nprocs=2)
    alone = make_parameters()
    take_steps(make_optimizer(alone), alone, range(4))
    for rank in range(2):
        shared: list[Tensor] = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_work_is_dealt_evenly() -> None:
    assert deal([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert deal([3], 2) == [[0], []]


class Reader(nn.Module):
    """Something of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.picture = nn.Embedding(11, 4), nn.Conv2d(3, 4, 2)
        self.hidden, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_muon_is_for_hidden_layers() -> None:
    model = Reader()
    names = {name for name, p in model.named_parameters() if id(p) in find_matrices(model)}
    assert names == {"picture.weight", "hidden.weight"}
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", ns_steps=3, weight_decay=0.1))
    assert isinstance(optimizer, MuonAdamW)
    assert optimizer.ns_steps == 3
    groups = optimizer.param_groups
    told = {(group[MATRICES], group["weight_decay"]): len(group["params"]) for group in groups}
    assert told == {(True, 0.1): 2, (False, 0.1): 2, (False, 0.0): 4}


def test_a_model_without_matrices_has_adamw_alone() -> None:
    optimizer = build_optimizer(nn.LayerNorm(3), TrainConfig(optimizer="muon"))
    assert not isinstance(optimizer, MuonAdamW)
