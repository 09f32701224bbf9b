"""Each way in which vLLM or llama.cpp would not take an adapter is told, with what to do; a plain one passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from lory.adapters.arithmetic import combine
from lory.adapters.lint import lint_adapter


def make_adapter(folder: Path, **options: Any) -> Path:
    net = nn.ModuleDict(
        {"embed": nn.Embedding(9, 6), "up": nn.Linear(6, 8), "lm_head": nn.Linear(8, 6), "conv": nn.Conv2d(3, 4, 3)}
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["up"]} | options
    peft.get_peft_model(net, peft.LoraConfig(**settings)).save_pretrained(folder)
    return folder


def test_a_plain_adapter_passes(tmp_path: Path) -> None:
    assert lint_adapter(make_adapter(tmp_path)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, ["vLLM and llama.cpp", "DoRA", "lory merge"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save: lm_head", "lory merge"]),
        ({"bias": "all"}, ["biases", "lory merge"]),
        ({"bias": "lora_only"}, ["biases", "lory merge"]),
        ({"lora_bias": True}, ["biases", "lory merge"]),
        ({"r": 20}, ["--max-lora-rank 32"]),
        ({"rank_pattern": {"up": 300}, "target_modules": ["up", "lm_head"]}, ["--max-lora-rank 320", "--even"]),
        ({"r": 600}, ["ranks up to 512", "lory merge"]),
        ({"use_rslora": True}, ["llama.cpp", "rsLoRA", "--even"]),
        ({"alpha_pattern": {"up": 3}}, ["llama.cpp", "alpha_pattern", "--even"]),
        ({"target_modules": ["embed"]}, ["embeddings"]),
        ({"target_modules": ["up", "lm_head"]}, ["output head", "tied"]),
        ({"target_modules": ["conv"]}, ["convolutions", "lory merge"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights=pissa", "path_initial_model_for_weight_conversion"]),
    ],
)
def test_what_would_go_wrong_is_told(tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
    lines = lint_adapter(make_adapter(tmp_path, **options))
    assert all(word in " ".join(lines) for word in words), lines


def test_soft_prompts_are_for_neither(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    (line,) = lint_adapter(tmp_path)
    assert "PROMPT_TUNING" in line


def test_the_remedy_of_uneven_adapters_works(tmp_path: Path) -> None:
    options = {"rank_pattern": {"up": 7}, "alpha_pattern": {"conv": 3}, "use_rslora": True}
    folder = make_adapter(tmp_path / "uneven", target_modules=["up", "lm_head"], **options)
    assert any("--even" in line for line in lint_adapter(folder))
    combine([(folder, 1.0)], tmp_path / "even", even=True)
    assert not any("--even" in line for line in lint_adapter(tmp_path / "even"))
