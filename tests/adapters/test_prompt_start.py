"""How soft prompts start, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lory.adapters.encoders import PromptConfig, find_soft_prompt
from lory.adapters.inject import AdapterConfig, attach_lora
from lory.adapters.prompt import (
    ENCODER_FILE,
    attach,
    check_mergeable,
    load,
    load_weights,
    read_config,
    save,
)
from lory.adapters.virtual_tokens import virtual_ids
from lory.runtime import UsageError, read_json, write_json

Load = Callable[[str], Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "prompt"},
    "mlp": {"type": "ptuning"},
    "lstm": {"type": "ptuning", "encoder": "lstm", "encoder_hidden_size": 7, "encoder_layers": 3},
    "prefix": {"type": "prefix"},
    "projection": {"type": "prefix", "projection": True},
}


def config_of(variant: str) -> PromptConfig:
    return PromptConfig(virtual_tokens=3, **VARIANTS[variant])


def with_prompt(load_random: Load, name: str, variant: str) -> Any:
    model = load_random(name)
    attach(model, config_of(variant))
    return model


class Tokenizer:
    """Stands in for a tokenizer."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


@pytest.mark.parametrize(("text", "rows"), [("hey", [7, 4, 24, 7, 4]), ("parrots", [15, 0, 17, 17, 14])])
def test_a_prompt_starts_as_a_text_cut_or_repeated(text: str, rows: list[int], load_random: Load) -> None:
    model = load_random("gemma2")
    config = PromptConfig(virtual_tokens=5, init="text", init_text=text)
    (match,) = attach(model, config, Tokenizer())
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(torch.tensor(virtual_ids(model))), embedding(torch.tensor(rows)))
    assert (match.name, match.kind, match.shape, match.parameters) == (
        "model.embed_tokens.virtual_tokens",
        "prompt",
        (5, 16),
        80,
    )


def test_a_prompt_starts_as_rows_of_the_vocabulary(load_random: Load) -> None:
    model = load_random("llama")
    attach(model, PromptConfig(virtual_tokens=5))
    rows = {tuple(row) for row in model.get_input_embeddings().weight.tolist()}
    assert all(tuple(row) in rows for row in find_soft_prompt(model)().tolist())


def test_tied_heads_stay_tied_and_know_no_virtual_tokens(load_random: Load) -> None:
    model = with_prompt(load_random, "gpt2", "prompt")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(torch.tensor([[*virtual_ids(model), 1, 5]])).logits.shape == (1, 5, 61)
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_will_be_trained_is_known_without_weights(variant: str, load_random: Load) -> None:
    model = load_random("llama")
    expected = attach(load_random("llama"), config_of(variant))
    assert attach(model.to("meta"), config_of(variant)) == expected


def test_a_prompt_cannot_be_merged(load_random: Load, tmp_path: Path) -> None:
    save(with_prompt(load_random, "llama", "prompt"), tmp_path, "base")
    with pytest.raises(UsageError, match="cannot be merged"):
        check_mergeable(tmp_path)


def test_a_model_carries_one_adapter(load_random: Load, tmp_path: Path) -> None:
    model = with_prompt(load_random, "llama", "prompt")
    save(model, tmp_path, "base")
    for variant in VARIANTS:
        with pytest.raises(UsageError, match="carries an adapter already"):
            attach(model, config_of(variant))
    with pytest.raises(UsageError, match="carries an adapter already"):
        load(model, tmp_path)
    other = load_random("llama")
    attach_lora(other, AdapterConfig())
    with pytest.raises(UsageError, match="carries an adapter already"):
        attach(other, config_of("prefix"))


def test_a_prompt_of_another_model_or_config_is_refused(load_random: Load, tmp_path: Path) -> None:
    for variant in VARIANTS:
        (tmp_path / variant).mkdir()
        save(with_prompt(load_random, "llama", variant), tmp_path / variant, "base")
    save_file({"prompt_embeddings": torch.zeros(3, 99)}, tmp_path / "prompt" / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"has \(3, 99\) for 'embedding.weight'"):
        load(load_random("llama"), tmp_path / "prompt")
    with pytest.raises(UsageError, match="made for another model"):
        load(load_random("gpt2"), tmp_path / "prefix")
    with pytest.raises(UsageError, match="another soft prompt"):
        load_weights(with_prompt(load_random, "llama", "mlp"), tmp_path / "prefix")
    with pytest.raises(UsageError, match="made for another model or config"):
        load_weights(with_prompt(load_random, "llama", "lstm"), tmp_path / "mlp")
    (tmp_path / "mlp" / ENCODER_FILE).unlink()
    load(load_random("llama"), tmp_path / "mlp")
    with pytest.raises(UsageError, match="PEFT does not store it"):
        load(load_random("llama"), tmp_path / "mlp", trainable=True)


def test_configs_that_lory_does_not_know_are_refused(load_random: Load, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    save(with_prompt(load_random, "llama", "lstm"), tmp_path, "base")
    good = read_json(path)
    assert read_config(tmp_path) == config_of("lstm")
    for change, message in (
        ({"peft_type": "LORA"}, "is not a soft prompt's"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"num_transformer_submodules": 2}, "an encoder with a decoder"),
        ({"num_virtual_tokens": None}, "has no 'num_virtual_tokens'"),
        ({"encoder_reparameterization_type": "GRU"}, "'encoder' was given 'gru'"),
    ):
        write_json(path, good | change)
        with pytest.raises(UsageError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "text"}, "belong together"),
        ({"init_text": "Hello"}, "belong together"),
        ({"init": "text", "init_text": "Hello", "type": "prefix"}, "init text is for type prompt"),
        ({"projection": True}, "projection is for type prefix"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptConfig(**settings)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for variant in VARIANTS:
        with pytest.raises(UsageError, match="encoder with a decoder"):
            attach(model, config_of(variant))
