"""Merged is the same as base plus adapter for every kind of layer, whatever form the checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lory.adapters.files import save_adapter
from lory.adapters.inject import AdapterConfig, attach_lora
from lory.adapters.merge import merge_shards
from lory.runtime import UsageError

IDS = torch.tensor([[1, 5, 9, 30, 2, 7]])
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"type": "dora"}}
Load = Callable[..., Any]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def make_adapter(model: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """Save a random adapter; the adapted model's logits."""
    before = logits(model)
    attach_lora(model, AdapterConfig(rank=3, alpha=7, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                lengths = "magnitude" in key
                parameter.mul_(1 + torch.rand_like(parameter)) if lengths else parameter.normal_(std=0.2)
    folder.mkdir()
    save_adapter(model, folder, "base")
    expected = logits(model)
    assert (expected - before).abs().max() > 0.05
    return expected


def merge(base: Path, adapter: Path, out: Path) -> Path:
    out.mkdir()
    merge_shards(base, adapter, out, max_shard_bytes=20_000)
    return out


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_merges(
    architecture_name: str, variant: str, architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    moe = architecture_name in ("mixtral", "qwen2-moe", "qwen3-moe")
    settings = VARIANTS[variant] | ({"exclude": ["experts"]} if moe and variant == "dora" else {})
    expected = make_adapter(load_random(architecture_name), tmp_path / "adapter", **settings)
    out = merge(architecture(architecture_name), tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random(architecture_name, out)), expected)


TIED = {"gpt2": "wte", "bert": "word_embeddings", "gemma2": "embed_tokens", "falcon": "word_embeddings"}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("tied", TIED)
def test_a_tied_embedding_merges_untied(
    tied: str, variant: str, architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    expected = make_adapter(load_random(tied), tmp_path / "adapter", targets=[TIED[tied]], **VARIANTS[variant])
    out = merge(architecture(tied), tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random(tied, out)), expected)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("whole", ["lm_head", "wte", "h.0.mlp", "ln_f"])
def test_whole_modules_merge(
    whole: str, architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    settings = {"targets": ["c_attn", "lm_head"] if whole == "wte" else ["c_attn"], "modules_to_save": [whole]}
    expected = make_adapter(load_random("gpt2"), tmp_path / "adapter", **settings)
    out = merge(architecture("gpt2"), tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random("gpt2", out)), expected)


def test_whole_experts_and_routers_merge(
    architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    settings = {
        "targets": ["gate_up_proj", "mlp.gate.weight"],
        "layers": [1],
        "modules_to_save": ["layers.0.mlp.experts"],
    }
    expected = make_adapter(load_random("mixtral"), tmp_path / "adapter", **settings)
    out = merge(architecture("mixtral"), tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random("mixtral", out)), expected)


def test_pissa_merges(architecture: Callable[[str], Path], load_random: Load, tmp_path: Path) -> None:
    expected = make_adapter(load_random("gpt2"), tmp_path / "adapter", init="pissa")
    out = merge(architecture("gpt2"), tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random("gpt2", out)), expected)


def test_a_vision_towers_convolution_merges(
    architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    model = load_random("qwen2-vl")
    attach_lora(model, AdapterConfig(rank=3, targets=["patch_embed.proj", "visual.blocks.0.attn.qkv"]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", "base")
    out = merge(architecture("qwen2-vl"), tmp_path / "adapter", tmp_path / "out")
    merged = load_random("qwen2-vl", out).state_dict()
    for path in ("model.visual.patch_embed.proj", "model.visual.blocks.0.attn.qkv"):
        torch.testing.assert_close(merged[f"{path}.weight"], model.get_submodule(path).merged_weight())


def rename(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model folder with its tensors changed."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = {key: value.contiguous() for key, value in change(load_file(folder / "model.safetensors")).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_checkpoint_without_the_models_prefix_merges(
    architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    # as GPT-2 itself lies on the hub
    base = rename(
        architecture("gpt2"),
        tmp_path / "base",
        lambda tensors: {key.removeprefix("transformer."): value for key, value in tensors.items()},
    )
    expected = make_adapter(load_random("gpt2"), tmp_path / "adapter", targets=["c_attn", "lm_head"])
    out = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random("gpt2", out)), expected)


def test_experts_that_are_stored_as_they_are_held_merge(load_random: Load, tmp_path: Path) -> None:
    load_random("qwen2-moe").save_pretrained(tmp_path / "base", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "base" / "model.safetensors"))
    expected = make_adapter(load_random("qwen2-moe"), tmp_path / "adapter")
    out = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits(load_random("qwen2-moe", out)), expected)


def test_what_the_checkpoint_holds_in_another_form_is_refused(
    architecture: Callable[[str], Path], load_random: Load, tmp_path: Path
) -> None:
    base = rename(
        architecture("llama"),
        tmp_path / "base",
        lambda tensors: {key.replace("q_proj.weight", "q_proj.codes"): value for key, value in tensors.items()},
    )
    make_adapter(load_random("llama"), tmp_path / "adapter", targets=["q_proj"])
    with pytest.raises(UsageError, match="may hold in a form that lory cannot merge into"):
        merge(base, tmp_path / "adapter", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
