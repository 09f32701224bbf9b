"""An adapter apart from any model: each layer's A, B and alpha, read from PEFT's files and written to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lory.adapters.files import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    look_up_alpha,
    read_stored,
    tidy_number,
)
from lory.runtime import UsageError, write_json

# What lory reads and factors cannot say
_BEYOND = ("use_dora", "target_parameters")


@dataclass(frozen=True)
class Factors:
    """One layer's low-rank change: alpha / R * B A.

    Linear layers have A (R, in) and B (out, R), embeddings A (R, tokens) and B (dim, R), and convolutions
    A (R, in, *kernel) and B (out, R, 1, ...), as in PEFT.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """An adapter's layers by module path, the other parameters that it brings by their path in the model, and more."""

    layers: Mapping[str, Factors]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained biases, whole modules, and copies of embeddings that PEFT adds when they carry an adapter."""
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    dropout: float = 0.0


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter in PEFT's format.

    Raises:
        UsageError: a file is missing or broken, or something in it is more than factors, biases and whole modules.
    """
    stored = read_stored(folder)
    config = stored.config
    for key in _BEYOND:
        if config.get(key):
            raise UsageError(f"{folder} uses {key}, which cannot be written as factors A and B; merge it instead.")
    layers = {}
    for module in dict.fromkeys(module for module, _ in stored.weights):
        lora_A, lora_B = stored.weights[module, "A"], stored.weights[module, "B"]
        _check_pair(lora_A, lora_B, module, folder / WEIGHTS_FILE)
        alpha = look_up_alpha(config, module)
        if config.get("use_rslora"):
            # Kalajdzievski 2023 (arXiv 2312.03732): rsLoRA scales by alpha / sqrt(R), factors by alpha / R
            alpha *= lora_A.shape[0] ** 0.5
        layers[module] = Factors(lora_A, lora_B, alpha, module in stored.embeddings)
    if not layers:
        raise UsageError(f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B.")
    return Adapter(
        layers=layers,
        parameters=stored.whole,
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        base=config.get("base_model_name_or_path"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        task_type=config.get("task_type"),
        dropout=float(config.get("lora_dropout") or 0.0),
    )


def _check_pair(lora_A: Tensor, lora_B: Tensor, module: str, where: Path) -> None:
    """Refuse factors whose product cannot be made."""
    if lora_A.ndim < 2 or lora_B.ndim != lora_A.ndim or lora_A.shape[0] != lora_B.shape[1]:
        shapes = f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
        raise UsageError(f"{where} has {shapes} for '{module}'; A (R, in) and B (out, R) are expected.")


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into an existing folder, as PEFT would.

    Layers are named by their whole paths, since only the model would tell whether an ending means the same ones.
    """
    tensors = {}
    for name, factors in adapter.layers.items():
        for part, tensor in (("A", factors.lora_A), ("B", factors.lora_B)):
            key = f"lora_embedding_{part}" if factors.is_embedding else f"lora_{part}.weight"
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    for name, tensor in adapter.parameters.items():
        module, _, parameter = name.rpartition(".")
        # PEFT keeps the layer that it wraps one level deeper
        key = f"{module}.base_layer.{parameter}" if module in adapter.layers else name
        tensors[f"{PREFIX}{key}"] = tensor
    # a clone, since safetensors refuses tensors that share their memory
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    write_json(folder / CONFIG_FILE, _make_config(adapter))


def _make_config(adapter: Adapter) -> dict[str, Any]:
    layers = adapter.layers
    rank, alpha = Counter((layer.rank, layer.alpha) for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": tidy_number(alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(layers),
        "rank_pattern": {re.escape(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {
            re.escape(n): tidy_number(layer.alpha) for n, layer in layers.items() if layer.alpha != alpha
        },
        "bias": _bias_mode(adapter),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "inference_mode": True,
    }


def _bias_mode(adapter: Adapter) -> str:
    """PEFT's `bias`: whose biases the adapter brings, those of whole modules aside."""
    owners = {
        name.rpartition(".")[0]
        for name in adapter.parameters
        if name.rpartition(".")[2] == "bias" and not is_saved(name, adapter.modules_to_save)
    }
    if not owners:
        return "none"
    return "lora_only" if owners <= adapter.layers.keys() else "all"


def is_saved(parameter: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of the modules that are stored whole (named by the ends of their paths)."""
    return any(f".{module}." in f".{parameter}" for module in modules)


def scale(tensor: Tensor, factor: float) -> Tensor:
    """`factor` times the tensor: the same bits for 1, else in fp32 or higher, so that 16 bits lose nothing."""
    return tensor if factor == 1 else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
