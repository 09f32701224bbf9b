"""Whether other programs would take an adapter as it is: what vLLM or llama.cpp refuse or leave out, and the remedy.

The rules are those of vLLM's `peft_helper.py`, `lora_model.py` and `config/lora.py`, and of llama.cpp's
`convert_lora_to_gguf.py` and `llama-adapter.h`, as they stood in 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lory.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from lory.runtime import UsageError, read_json

# What `vllm serve --max-lora-rank` takes; 16 is its default
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
_MERGE = "merge it into its base with `lory merge` and serve that"
_EVEN = "rewrite it with `lory convert ADAPTER --out OUT --even`"
# How a base's weights stand for these ways to start an adapter, in PEFT's own words for them
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def lint_adapter(folder: Path) -> list[str]:
    """One line for each thing in an adapter folder that vLLM or llama.cpp would refuse or get wrong, with the remedy.

    An empty list means that nothing is known to stand in the way; whether they know the base model, or adapt its
    embeddings, depends on the model.

    Raises:
        UsageError: the folder has no readable adapter_config.json or adapter_model.safetensors.
    """
    config = read_json(folder / CONFIG_FILE)
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"vLLM and llama.cpp load LoRA adapters only, and this is {kind}; chat with it or serve it with lory."]
    shapes = _read_shapes(folder / WEIGHTS_FILE)
    return [*_lint_features(config), *_lint_strength(config), *_lint_ranks(config), *_lint_tensors(shapes)]


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    except SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}.") from error


def _lint_features(config: Mapping[str, Any]) -> list[str]:
    """What is more than A and B."""
    lines = []
    if config.get("use_dora"):
        lines.append(f"vLLM and llama.cpp do not know DoRA; {_MERGE}, or train with adapter.type lora.")
    if saved := config.get("modules_to_save"):
        names = ", ".join(saved)
        lines.append(f"vLLM and llama.cpp refuse whole modules (modules_to_save: {names}); {_MERGE}.")
    if config.get("bias") not in (None, "none") or config.get("lora_bias"):
        lines.append(f"vLLM and llama.cpp refuse trained biases; {_MERGE}.")
    if config.get("trainable_token_indices"):
        lines.append(f"llama.cpp and most versions of vLLM refuse trained tokens; {_MERGE}.")
    if config.get("target_parameters"):
        lines.append(
            "llama.cpp has no place for adapters of stacked experts (target_parameters), and vLLM takes them for some "
            f"mixtures of experts only; {_MERGE}."
        )
    others = ("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora")
    lines += [f"vLLM refuses {key}; {_MERGE}." for key in others if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        lines.append(
            f"vLLM refuses init_lora_weights={start}, which changes the base's weights at loading, and llama.cpp does "
            "not see that it does; save it as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)."
        )
    return lines


def _lint_strength(config: Mapping[str, Any]) -> list[str]:
    """Where the scaling comes out wrong, without a word from the program."""
    lines = []
    if config.get("use_rslora"):
        lines.append(f"llama.cpp does not know rsLoRA and would apply it too weakly; {_EVEN}.")
    if config.get("alpha_pattern"):
        lines.append(
            f"llama.cpp, and versions of vLLM that do not read alpha_pattern, give all layers the same alpha; {_EVEN}."
        )
    elif config.get("rank_pattern") and not config.get("use_rslora"):
        # llama.cpp divides by each layer's own rank, as PEFT does
        lines.append(f"Versions of vLLM that do not read rank_pattern scale all layers by the same rank; {_EVEN}.")
    return lines


def _lint_ranks(config: Mapping[str, Any]) -> list[str]:
    rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    if rank <= _VLLM_DEFAULT_RANK:
        return []
    if rank > VLLM_RANKS[-1]:
        return [f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this has {rank}; {_MERGE}."]
    wanted = min(choice for choice in VLLM_RANKS if choice >= rank)
    return [f"vLLM takes rank {_VLLM_DEFAULT_RANK} unless told otherwise; start it with --max-lora-rank {wanted}."]


def _lint_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What only the names and shapes tell."""
    lines = []
    if any("lora_embedding_" in name for name in shapes):
        lines.append(f"vLLM adapts embeddings in some models only; if it names them as unexpected, {_MERGE}.")
    if any(".lm_head.lora_" in name for name in shapes):
        lines.append(
            "vLLM adapts the output head in some models only, and llama.cpp not where it is tied to the embeddings; "
            f"if they refuse it, {_MERGE}."
        )
    if any(len(shape) > 2 and ".lora_" in name for name, shape in shapes.items()):
        lines.append(f"vLLM and llama.cpp do not adapt convolutions; {_MERGE}.")
    return lines
