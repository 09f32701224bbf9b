"""Every kind of adapter trains, stops, goes on and chats alike; what a config of one kind may not say is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lory
from lory.config import build, dump_yaml, parse_yaml
from lory.runtime import UsageError
from lory.training.config import Config
from lory.training.preview import estimate_memory
from lory.training.run import prepare, train

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "dropout": 0.1},
    "dora": {"type": "dora", "rank": 3},
    "pissa": {"rank": 2, "init": "pissa"},
    "rslora, LoRA+": {"rank": 4, "rslora": True, "lora_plus_ratio": 8.0},
    "modules_to_save": {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "full": {"type": "full"},
    "last layer": {"type": "freeze", "last_layers": 1},
    "norms": {"type": "freeze", "trainable": r".*norm\.weight"},
    "prompt": {"type": "prompt", "virtual_tokens": 5},
    "prompt from a text": {"type": "prompt", "virtual_tokens": 4, "init": "text", "init_text": "Add the numbers."},
    "ptuning": {"type": "ptuning", "virtual_tokens": 3},
    "prefix": {"type": "prefix", "virtual_tokens": 4, "projection": True},
}
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "prompt_encoder.safetensors", "optimizer.safetensors")


def read_weights(checkpoint: Path) -> dict[str, bytes]:
    return {name: (checkpoint / name).read_bytes() for name in WEIGHTS if (checkpoint / name).exists()}


@pytest.mark.parametrize("name", KINDS)
def test_resumed_is_the_run_that_never_stopped_and_it_chats(quick: dict[str, Any], name: str) -> None:
    quick["adapter"] = KINDS[name]
    quick["train"]["keep_checkpoints"] = 99
    folder = train(quick).folder
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    whole, answer = read_weights(checkpoints[-1]), lory.load(folder).chat("3 and 7?")
    assert len(whole) >= 2
    for later in checkpoints[1:]:
        shutil.rmtree(later)
    train(folder, resume="last")
    assert read_weights(checkpoints[-1]) == whole
    assert lory.load(folder).chat("3 and 7?") == answer


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("name", ["full", "last layer"])
def test_bf16_weights_go_on_with_all_bits_of_their_masters(quick: dict[str, Any], name: str, dtype: str) -> None:
    quick["adapter"], quick["model"]["dtype"] = KINDS[name], dtype
    quick["train"]["keep_checkpoints"] = 99
    folder = train(quick).folder
    first, *later = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    whole = read_weights(later[-1])
    for path in later:
        shutil.rmtree(path)
    train(folder, resume=first.name)
    assert read_weights(later[-1]) == whole


@pytest.mark.parametrize("name", KINDS)
def test_the_config_of_a_kind_survives_its_yaml_and_its_memory_is_known(quick: dict[str, Any], name: str) -> None:
    quick["adapter"] = KINDS[name]
    config = build(Config, quick, "config")
    assert build(Config, parse_yaml(dump_yaml(config), "yaml"), "yaml") == config
    prepared = prepare(config)
    memory = estimate_memory(prepared, prepared.plan().rows)
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    assert memory["adapter_and_optimizer"] > 0


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"type": "full", "rank": 3}, r"unknown key 'adapter\.rank'; known here: type"),
        (
            {"type": "freeze", "last_layer": 3},
            r"unknown key 'adapter\.last_layer'; did you mean 'adapter\.last_layers'",
        ),
        ({"rnk": 2}, r"unknown key 'adapter\.rnk'; did you mean 'adapter\.rank'"),
        ({"type": "prompt", "virtual_token": 2}, r"did you mean 'adapter\.virtual_tokens'"),
        ({"type": "nope"}, r"'adapter'.*adapter\.type should be one of lora, dora, prompt"),
        ({"type": "freeze"}, r"freeze needs last_layers or trainable"),
        ({"type": "freeze", "trainable": "("}, r"'adapter\.trainable' was given '\(': a regular expression"),
        ({"rank": 0}, r"'adapter\.rank' was given 0"),
    ],
)
def test_a_wrong_adapter_section_is_explained(quick: dict[str, Any], adapter: Mapping[str, Any], sentence: str) -> None:
    quick["adapter"] = adapter
    with pytest.raises(UsageError, match=sentence):
        build(Config, quick, "config")


def test_a_soft_prompt_cannot_be_merged(quick: dict[str, Any], tmp_path: Path) -> None:
    from lory import export

    quick["adapter"] = KINDS["prompt"]
    folder = train(quick).folder
    with pytest.raises(UsageError, match="soft prompt"):
        export.merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
