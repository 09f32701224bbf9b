"""Adapters on disk are PEFT's: PEFT reads ours with equal logits, we read PEFT's, and refuse by name what we lack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lory.adapters.files import AdapterFiles, load_adapter, read_adapter_config, save_adapter
from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora
from lory.runtime import UsageError

IDS = torch.tensor([[5, 17, 99, 3, 64, 1, 2, 120]])
EXPRESSION = r".*\.(0|1)\..*(q|down)_proj"


@pytest.fixture
def fresh(random_model: Callable[..., Any]) -> Callable[[], Any]:
    """A function that makes the same random model each time."""
    return lambda: random_model("Llama")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def fill(parameters: Any) -> None:
    """Values that make the adapter change the logits a good deal."""
    torch.manual_seed(5)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)


def save_ours(model: nn.Module, folder: Path) -> Tensor:
    fill(p for p in model.parameters() if p.requires_grad)
    folder.mkdir(exist_ok=True)
    save_adapter(model, folder, "the/base")
    return logits(model)


def save_pefts(model: nn.Module, folder: Path, **settings: Any) -> Tensor:
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    fill(p for name, p in peft_model.named_parameters() if ".lora_" in name)
    peft_model.save_pretrained(folder)
    return logits(peft_model)


def assert_equal(found: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).abs().max() > 0.1, "the adapter does nothing, so nothing is shown"
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["lm_head", "layers.1.mlp.up_proj"], EXPRESSION]
)
@pytest.mark.parametrize(("rank", "alpha"), [(3, 7.5), (8, 16)])
def test_peft_loads_ours_with_equal_logits(
    fresh: Callable[[], Any], tmp_path: Path, targets: str | list[str], rank: int, alpha: float
) -> None:
    model = fresh()
    attach_lora(model, AdapterConfig(rank=rank, alpha=alpha, dropout=0.2, targets=targets))
    expected = save_ours(model, tmp_path)
    theirs = PeftModel.from_pretrained(fresh(), tmp_path)
    assert_equal(logits(theirs), expected, logits(fresh()))
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(list(adapted_layers(model)))
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (rank, alpha, 0.2)
    assert config.base_model_name_or_path == "the/base"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
        {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 12, "lora_dropout": 0.1},
        {"target_modules": EXPRESSION, "r": 4, "lora_alpha": 12},
        {"target_modules": "all-linear", "r": 9, "lora_alpha": 4, "use_rslora": True},
        {
            "target_modules": "all-linear",
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": {r"layers\.1\..*": 7, "q_proj": 2},
            "alpha_pattern": {"v_proj": 11, r"layers\.0\..*": 1.5},
        },
        {"target_modules": ["v_proj"], "r": 5, "rank_pattern": {"v_proj": 7}, "use_rslora": True},
        {"target_modules": ["q_proj"], "r": 3, "layers_to_transform": [1]},
        {"target_modules": ["gate_proj", "o_proj"], "r": 3, "init_lora_weights": "gaussian"},
    ],
)
def test_we_load_pefts_with_equal_logits(fresh: Callable[[], Any], tmp_path: Path, settings: dict[str, Any]) -> None:
    save_pefts(fresh(), tmp_path, **settings)
    # as PEFT reads it: it sorts the patterns when it writes them, and the first that matches counts
    expected = logits(PeftModel.from_pretrained(fresh(), tmp_path))
    model = fresh()
    load_adapter(model, tmp_path)
    assert_equal(logits(model), expected, logits(fresh()))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_pefts_adapter_saved_again_is_the_same(fresh: Callable[[], Any], tmp_path: Path) -> None:
    expected = save_pefts(fresh(), tmp_path / "theirs", target_modules="all-linear", r=4, use_rslora=True)
    model = fresh()
    load_adapter(model, tmp_path / "theirs", trainable=True)
    assert {name[-6:] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", "the/base")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert_equal(logits(PeftModel.from_pretrained(fresh(), tmp_path / "ours")), expected, logits(fresh()))


def test_saved_and_loaded_is_bitwise_the_same(fresh: Callable[[], Any], tmp_path: Path) -> None:
    model = fresh()
    attach_lora(model, AdapterConfig(rank=3, alpha=7, dropout=0.3))
    expected = save_ours(model, tmp_path)
    again = fresh()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert {layer.lora_dropout for _, layer in adapted_layers(again)} == {0.3}


def test_pissa_is_refused_because_it_changes_the_base(fresh: Callable[[], Any], tmp_path: Path) -> None:
    save_pefts(fresh(), tmp_path, target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    with pytest.raises(UsageError, match="init_lora_weights='pissa'"):
        load_adapter(fresh(), tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "has no 'peft_type'"),
        ([], "has no 'peft_type'"),
        ({"peft_type": "IA3"}, "is a IA3 adapter; LORA is what lory reads"),
        ({"peft_type": "LORA"}, "has no 'lora_alpha'"),
    ],
)
def test_a_config_that_is_no_loras(tmp_path: Path, config: Any, sentence: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=sentence):
        read_adapter_config(tmp_path)


@pytest.fixture
def ours(fresh: Callable[[], Any], tmp_path: Path) -> Path:
    """An adapter on all q_proj layers, saved."""
    model = fresh()
    attach_lora(model, AdapterConfig(rank=3, targets=["q_proj"]))
    save_ours(model, tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_missing_file_and_a_pickled_one(ours: Path) -> None:
    (ours / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors does not exist\.$"):
        AdapterFiles(ours)
    (ours / "adapter_model.bin").touch()
    with pytest.raises(UsageError, match="a pickle and is not read"):
        AdapterFiles(ours)


def test_a_torn_file(ours: Path) -> None:
    path = ours / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UsageError, match="is not a whole safetensors file"):
        AdapterFiles(ours)


def test_half_a_pair_a_foreign_tensor_and_none_at_all(ours: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(ours, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(UsageError, match="holds 'extra', which is not a LoRA weight"):
        AdapterFiles(ours)
    rewrite(ours, lambda tensors: (tensors.pop("extra"), tensors.pop(key)))
    with pytest.raises(UsageError, match=r"only one of lora_A and lora_B for 'model\.layers\.0\.self_attn\.q_proj'"):
        AdapterFiles(ours)
    rewrite(ours, dict.clear)
    with pytest.raises(UsageError, match="holds no tensors"):
        AdapterFiles(ours)


def test_the_formula_of_the_scaling(fresh: Callable[[], Any], tmp_path: Path) -> None:
    save_pefts(fresh(), tmp_path, target_modules=["q_proj"], r=4, lora_alpha=12, use_rslora=True)
    files = AdapterFiles(tmp_path)
    assert files.modules == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert files.scaling(files.modules[0]) == pytest.approx(12 / 4**0.5)
    lora_A, lora_B = files.factors(files.modules[0])
    assert (lora_A.shape, lora_B.shape) == ((4, 24), (24, 4))
