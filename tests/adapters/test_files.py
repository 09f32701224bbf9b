"""Adapter folders are read as they are meant, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lory.adapters.files import AdapterFiles, load_adapter, restore_adapter, save_adapter
from lory.adapters.inject import AdapterConfig, attach_lora
from lory.runtime import UsageError

Load = Callable[[str], Any]


@pytest.fixture
def adapter(load_random: Load, tmp_path: Path) -> Path:
    model = load_random("llama")
    attach_lora(model, AdapterConfig(rank=2, targets=["q_proj"]))
    save_adapter(model, tmp_path, "somewhere/base")
    return tmp_path


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, drop: str = "", **values: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if not drop or drop not in key}
    save_file(kept | values, path)


@pytest.mark.parametrize(
    "values",
    [
        {"trainable_token_indices": [3]},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 2}},
        {"some_future_thing": 1},
    ],
)
def test_what_is_unknown_is_refused_by_name(adapter: Path, values: dict[str, Any]) -> None:
    edit_config(adapter, **values)
    with pytest.raises(UsageError, match=next(iter(values))):
        AdapterFiles(adapter)


def test_keys_that_change_nothing_are_read(adapter: Path) -> None:
    edit_config(adapter, some_future_thing=None, layers_to_transform=[0], layers_pattern="layers", peft_version="9")
    assert AdapterFiles(adapter).modules == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_weights_of_a_changed_base_are_refused_with_the_remedy(adapter: Path, init: str) -> None:
    edit_config(adapter, init_lora_weights=init)
    with pytest.raises(UsageError, match="path_initial_model_for_weight_conversion"):
        AdapterFiles(adapter)


def test_half_an_adapter_is_refused(adapter: Path) -> None:
    edit_weights(adapter, drop="layers.1.self_attn.q_proj.lora_B")
    with pytest.raises(UsageError, match=r"only one of lora_A and lora_B for 'model\.layers\.1\.self_attn\.q_proj'"):
        AdapterFiles(adapter)


def test_dora_without_its_magnitudes_is_refused(adapter: Path) -> None:
    edit_config(adapter, use_dora=True)
    with pytest.raises(UsageError, match=r"disagree whether .* is DoRA"):
        AdapterFiles(adapter)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight", "not a LoRA weight that lory knows"),
        ("model.layers.0.self_attn.q_proj.weight", "not a LoRA weight that lory knows"),
        ("base_model.model.model.token_adapter.trainable_tokens_delta", "not a LoRA weight that lory knows"),
        ("base_model.model.model.elsewhere.weight", "'model.elsewhere.weight', which this model does not have"),
        ("base_model.model.model.norm.weight", r"has \(3,\) for 'model.norm.weight', where this model has \(16,\)"),
    ],
)
def test_a_tensor_with_no_place_is_refused_by_name(adapter: Path, key: str, message: str, load_random: Load) -> None:
    edit_weights(adapter, **{key: torch.zeros(3)})
    with pytest.raises(UsageError, match=message):
        load_adapter(load_random("llama"), adapter)


def test_an_adapter_of_another_model_is_refused(adapter: Path, load_random: Load) -> None:
    with pytest.raises(UsageError, match="1 more layers that this model does not have; it was made for somewhere/base"):
        load_adapter(load_random("gpt2"), adapter)
    edit_weights(adapter, **{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 17)})
    with pytest.raises(UsageError, match=r"has \(2, 17\) for .* where this model has \(2, 16\)"):
        load_adapter(load_random("llama"), adapter)


def test_a_second_adapter_is_refused(adapter: Path, load_random: Load) -> None:
    model = load_random("llama")
    load_adapter(model, adapter)
    with pytest.raises(UsageError, match="carries an adapter already"):
        load_adapter(model, adapter)


def test_an_adapter_loaded_to_be_trained_trains_its_own_parameters_only(adapter: Path, load_random: Load) -> None:
    model = load_random("llama")
    load_adapter(model, adapter, trainable=True)
    learnt = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learnt) == 4
    assert all("lora_" in name for name in learnt)


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("gpt2", {"type": "dora", "targets": ["c_attn", "wte"]}),
    "pissa": ("llama", {"init": "pissa", "rslora": True}),
    "experts": ("qwen2-moe", {}),
    "whole": ("gpt2", {"modules_to_save": ["lm_head", "ln_f"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_training_goes_on_from_what_was_stored(case: str, load_random: Load, tmp_path: Path) -> None:
    architecture, settings = CONFIGS[case]
    config = AdapterConfig(rank=2, alpha=5, **settings)
    model, again = load_random(architecture), load_random(architecture)
    attach_lora(model, config)
    attach_lora(again, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    save_adapter(model, tmp_path, "base")
    restore_adapter(again, tmp_path)
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_going_on_with_other_layers_is_refused(adapter: Path, load_random: Load) -> None:
    model = load_random("llama")
    attach_lora(model, AdapterConfig(rank=2, targets=["v_proj"]))
    with pytest.raises(UsageError, match="adapts other layers than this config does"):
        restore_adapter(model, adapter)


def test_an_adapter_with_the_module_names_of_older_transformers_is_read(load_random: Load, tmp_path: Path) -> None:
    model = load_random("qwen2-vl")
    attach_lora(model, AdapterConfig(rank=2, targets=["q_proj", "qkv"], modules_to_save=["language_model.norm"]))
    save_adapter(model, tmp_path, "base")
    path = tmp_path / "adapter_model.safetensors"
    old = {
        key.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): value
        for key, value in load_file(path).items()
    }
    assert any("base_model.model.visual.blocks" in key for key in old)
    assert "base_model.model.model.norm.weight" in old
    save_file(old, path)
    again = load_random("qwen2-vl")
    load_adapter(again, tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
