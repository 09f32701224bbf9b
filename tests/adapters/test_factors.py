"""Adapters read as factors: the same folder that a model would be given, under the same rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lory.adapters.factors import read_adapter
from lory.adapters.files import AdapterFiles
from lory.runtime import UsageError

KEY = "base_model.model.up"


def write(folder: Path, config: dict[str, Any], **more: torch.Tensor) -> Path:
    """An adapter of rank 2 on one layer."""
    tensors = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(4, 2), **more}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6} | config))
    save_file({f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"up": 10}}])
def test_factors_and_model_agree_on_the_scaling(tmp_path: Path, config: dict[str, Any]) -> None:
    factors = read_adapter(write(tmp_path, config)).layers["up"]
    assert factors.scaling == pytest.approx(AdapterFiles(tmp_path).scaling("up"))


def test_convolutions_keep_their_shape(tmp_path: Path) -> None:
    kernels = {"lora_A.weight": torch.ones(2, 3, 5), "lora_B.weight": torch.ones(4, 2, 1)}
    factors = read_adapter(write(tmp_path, {}, **kernels)).layers["up"]
    assert (factors.lora_A.shape, factors.lora_B.shape) == ((2, 3, 5), (4, 2, 1))
    assert [part.shape for part in AdapterFiles(tmp_path).factors("up")] == [(2, 15), (4, 2)]


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication=.* which lory does not read"),
        ({"lora_alpha": "6"}, {}, "lora_alpha='6' for 'up'; a number is expected"),
        ({"use_dora": True}, {"lora_magnitude_vector.weight": torch.ones(4)}, "uses use_dora, which cannot be written"),
        ({}, {"lora_magnitude_vector.weight": torch.ones(4)}, "disagree whether 'up' is DoRA"),
        ({}, {"lora_B.weight": torch.ones(4, 3)}, r"A \(2, 3\) and B \(4, 3\) for 'up'"),
        ({}, {"lora_C.weight": torch.ones(1)}, "which is not a LoRA weight that lory knows"),
    ],
)
def test_what_factors_cannot_say_is_refused(tmp_path: Path, config: Any, more: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_adapter(write(tmp_path, config, **more))
