"""Tiny random models of many architectures, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False}
_EXPERTS = _GROUPED | {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 10,
}
_VISION = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2}

# name: (transformers' class, its config's settings)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "qwen2-moe": ("Qwen2MoeForCausalLM", _EXPERTS),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _EXPERTS | {"mlp_only_layers": [1]}),
    "mixtral": ("MixtralForCausalLM", _EXPERTS),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _GROUPED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
            "vision_config": _VISION,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bert": ("BertForMaskedLM", _SMALL),
    "roberta": ("RobertaForMaskedLM", _SMALL),
    "deberta-v2": ("DebertaV2ForMaskedLM", _SMALL | {"pos_att_type": ["p2c", "c2p"], "relative_attention": True}),
    "glm4": ("Glm4ForCausalLM", _GROUPED),
    # transformers runs it by Llama's classes
    "internlm3": ("InternLM3", _GROUPED | {"qkv_bias": True, "bias": True}),
    "gemma2": ("Gemma2ForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "falcon": ("FalconForCausalLM", _SMALL | {"multi_query": True, "new_decoder_architecture": False}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with the argument `architecture_name` run for every architecture."""
    if "architecture_name" in metafunc.fixturenames:
        import transformers

        there = [name for name in ARCHITECTURES if name != "internlm3" or hasattr(transformers, "InternLM3Config")]
        metafunc.parametrize("architecture_name", there)


@pytest.fixture(scope="session")
def load_random(architecture: Callable[[str], Path]) -> Callable[[str], Any]:
    """A function from a name in `ARCHITECTURES` to a fresh copy of its random model, in eval mode."""
    import transformers

    def load(name: str, folder: Path | None = None) -> Any:
        found = getattr(transformers, ARCHITECTURES[name][0], transformers.AutoModelForCausalLM)
        return found.from_pretrained(folder or architecture(name)).eval()

    return load


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in `ARCHITECTURES` to the folder of a random fp32 model; do not write into it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_random(*ARCHITECTURES[name], made[name])
        return made[name]

    return make


def save_random(class_name: str, settings: dict[str, Any], folder: Path) -> None:
    """Save a model with weights so large that adapters show."""
    import transformers

    torch.manual_seed(0)
    if class_name == "InternLM3":
        model = transformers.AutoModelForCausalLM.from_config(transformers.InternLM3Config(**settings))
    else:
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
