"""LoRA+: B learns at a higher rate than A, and everything else is as without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.training.optim import TrainConfig, build_optimizer, build_schedule


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    attach_lora(model, AdapterConfig(rank=2, targets=["0", "2"], type="dora", modules_to_save=["1"]))
    return model


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_only_the_rate_of_b_is_another(ratio: float | None) -> None:
    model = make_model()
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, config, ratio)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, (rate, decay) in found.items():
        assert rate == (1e-3 * (ratio or 1) if name.endswith("lora_B") else 1e-3)
        assert decay == (0.1 if name.endswith(("lora_A", "lora_B")) else 0.0)


def test_the_schedule_keeps_the_ratio() -> None:
    optimizer = build_optimizer(make_model(), TrainConfig(schedule="linear", warmup=0.0), 4.0)
    schedule = build_schedule(optimizer, TrainConfig(schedule="linear", warmup=0.0), 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([1e-4, 4e-4])
