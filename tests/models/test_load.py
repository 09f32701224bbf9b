"""Loading a base model and its tokenizer: in the precision asked for, or with what is wrong with the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from lory.models.load import (
    choose_dtype,
    load_generation_config,
    load_model,
    load_tokenizer,
    terminators,
)
from lory.models.resolve import Resolved
from lory.runtime import UsageError

CPU = torch.device("cpu")


def at(folder: Path, adapter: Path | None = None) -> Resolved:
    return Resolved(str(folder), str(folder), folder, adapter)


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(tiny_model: Path, name: str) -> None:
    model = load_model(at(tiny_model), name, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
    assert not any(module.training for module in model.modules())


def test_auto_is_float32_on_a_cpu() -> None:
    assert choose_dtype("auto", CPU) == torch.float32


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json; it is not a model folder"):
        load_model(at(tmp_path))


def test_pickled_weights_are_not_read(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \.safetensors weights; pickled ones \(\.bin\) are not read"):
        load_model(at(broken))


def test_a_torn_weight_file_is_an_error_not_a_traceback(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="could not be loaded as a causal language model"):
        load_model(at(broken))


def test_an_unknown_architecture_is_refused(broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps({"model_type": "parrot"}))
    with pytest.raises(UsageError, match=r"config.json could not be read: .*parrot"):
        load_model(at(broken))


def test_a_missing_weight_is_not_drawn_at_random(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 of the model's weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(at(broken))


def test_a_weight_of_another_shape_is_refused(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="could not be loaded as a causal language model"):
        load_model(at(broken))


def test_the_tokenizer_saved_with_the_adapter_comes_first(tiny_model: Path, tmp_path: Path) -> None:
    assert load_tokenizer(at(tiny_model, tmp_path)).name_or_path == str(tiny_model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    assert load_tokenizer(at(tiny_model, tmp_path)).name_or_path == str(tmp_path)


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"The tokenizer in .* could not be loaded"):
        load_tokenizer(at(tmp_path))


def test_generation_config_comes_from_its_file_or_else_from_the_models_config(broken: Path) -> None:
    (broken / "generation_config.json").unlink(missing_ok=True)
    assert load_generation_config(at(broken)).eos_token_id == 2
    GenerationConfig(eos_token_id=[5, 7], temperature=0.5, do_sample=True).save_pretrained(broken)
    assert load_generation_config(at(broken)).eos_token_id == [5, 7]


@pytest.mark.parametrize(
    ("configured", "expected"), [(2, (2,)), (9, (9, 2)), ([9, 8], (9, 8, 2)), ([2, 9], (2, 9)), (None, (2,))]
)
def test_terminators_are_the_models_own_and_the_tokenizers(
    tiny_model: Path, configured: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    tokenizer = load_tokenizer(at(tiny_model))
    assert tokenizer.eos_token_id == 2
    assert terminators(GenerationConfig(eos_token_id=configured), tokenizer) == expected


def test_a_model_that_could_never_end_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(at(tiny_model))
    tokenizer.eos_token = None
    assert terminators(GenerationConfig(eos_token_id=4), tokenizer) == (4,)
    with pytest.raises(UsageError, match="names no end-of-sequence token"):
        terminators(None, tokenizer)
