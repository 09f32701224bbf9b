"""Masters: bf16 weights that learn like fp32 ones, and resume with all bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lory.training.masters import MASTER, MasterAdamW


def make_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # values that bf16 has exactly
    return [nn.Parameter(torch.randn(*shape, generator=generator).bfloat16().to(dtype)) for shape in ((5, 3), (4,))]


def make_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    matrix, vector = parameters
    return [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]


def make_optimizer(parameters: list[nn.Parameter]) -> MasterAdamW:
    return MasterAdamW(make_groups(parameters), 1e-4)


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 3), (4,))]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_fp32_parameters_are_updated_exactly_as_by_adamw() -> None:
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    plain = torch.optim.AdamW(make_groups(theirs), 1e-4)
    optimizer = make_optimizer(ours)
    take_steps(optimizer, ours, range(5))
    take_steps(plain, theirs, range(5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(MASTER not in values for values in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_follow_the_fp32_trajectory_to_one_rounding(dtype: torch.dtype) -> None:
    half, full = make_parameters(dtype), make_parameters(torch.float32)
    take_steps(make_optimizer(half), half, range(50))
    take_steps(make_optimizer(full), full, range(50))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(half, full, strict=True))
    assert all(parameter.dtype == dtype for parameter in half)


def test_updates_that_bf16_would_lose_add_up() -> None:
    lost, kept = (nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2))
    for parameter, optimizer in (
        (lost, torch.optim.AdamW([lost], 1e-4)),
        (kept, MasterAdamW([{"params": [kept]}], 1e-4)),
    ):
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert lost.item() == 1.0
    assert kept.item() == pytest.approx(0.99, abs=4e-3)


def test_resumed_is_uninterrupted_bit_for_bit() -> None:
    whole = make_parameters(torch.bfloat16)
    optimizer = make_optimizer(whole)
    take_steps(optimizer, whole, range(3))
    stored = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer.state_dict()["state"].items()}
    weights = [parameter.detach().clone() for parameter in whole]
    take_steps(optimizer, whole, range(3, 40))

    resumed = make_parameters(torch.bfloat16)
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    fresh = make_optimizer(resumed)
    fresh.load_state_dict({"state": stored, "param_groups": fresh.state_dict()["param_groups"]})
    take_steps(fresh, resumed, range(3, 40))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    for number, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, fresh.state_dict()["state"][number][name]) for name, value in values.items())


def test_a_state_without_masters_is_refused() -> None:
    full, half = make_parameters(torch.float32), make_parameters(torch.bfloat16)
    optimizer = make_optimizer(full)
    take_steps(optimizer, full, range(1))
    with pytest.raises(ValueError, match="0 fp32 masters are stored, and this optimizer has 2"):
        make_optimizer(half).load_state_dict(optimizer.state_dict())


def test_zero_grad_clears_the_half_parameters_too() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = make_optimizer(parameters)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.zero_grad()
    assert parameters[0].grad is None


def test_a_parameter_without_gradient_stays() -> None:
    parameters = make_parameters(torch.bfloat16)
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    make_optimizer(parameters).step()
    assert torch.equal(parameters[1], before)
