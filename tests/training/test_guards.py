"""What would make a run untrue, or leave it spoilt, is noticed and said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lory.models import load as load_module
from lory.models.resolve import list_checkpoints
from lory.runtime import LoryError, UsageError
from lory.training.monitor import read_log
from lory.training.run import train


def test_a_spoilt_model_is_noticed_at_the_evaluation(quick: dict[str, Any]) -> None:
    quick["data"]["eval_fraction"] = 0.3
    quick["train"] |= {"learning_rate": 1e20, "max_steps": 1, "max_grad_norm": 0, "warmup": 0}
    with pytest.raises(LoryError, match="The evaluation loss is nan after step 1"):
        train(quick)


def test_going_on_with_other_base_weights_is_refused(quick: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(quick["model"]["path"], base)
    quick["model"]["path"] = str(base)
    folder = train(quick).folder
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="base model's weights have changed"):
        train(folder, resume="last")


def test_going_on_in_another_precision_is_refused(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(quick).folder
    monkeypatch.setattr(load_module, "choose_dtype", lambda name, device: torch.bfloat16)
    with pytest.raises(UsageError, match=r"trained in torch\.float32, and here model\.dtype gives torch\.bfloat16"):
        train(folder, resume="last")


def test_going_on_from_an_older_checkpoint_takes_the_newer_ones_back(quick: dict[str, Any]) -> None:
    quick["train"] |= {"keep_checkpoints": 99, "log_every_steps": 1}
    folder = train(quick).folder
    first, *newer = list_checkpoints(folder)
    before = {path: (path / "adapter_model.safetensors").read_bytes() for path in newer}
    losses = [(line["step"], line.get("loss")) for line in read_log(folder)]
    train(folder, resume=first.name)
    assert list_checkpoints(folder) == [first, *newer]
    assert {path: (path / "adapter_model.safetensors").read_bytes() for path in newer} == before
    assert [(line["step"], line.get("loss")) for line in read_log(folder)] == losses
    assert not list(folder.glob(".*.tmp"))
