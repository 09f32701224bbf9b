"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lory.adapters.inject import adapted_layers, list_linears, replace_linear
from lory.runtime import UsageError, read_json, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# What PEFT's LoRA can do beyond this format's reader, and the value that means "not used"
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "exclude_modules": (None, [], ""),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # the other ways to start (pissa, olora, corda, loftq, ...) change the base, and so are no adapters to the plain one
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class AdapterFiles:
    """An adapter folder, read: PEFT's config and, for each module path, its A (R, in), B (out, R) and scaling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.weights = _read_weights(folder / WEIGHTS_FILE)
        self.modules = sorted({module for module, _ in self.weights})
        for module in self.modules:
            if (module, "A") not in self.weights or (module, "B") not in self.weights:
                raise UsageError(f"{folder / WEIGHTS_FILE} has only one of lora_A and lora_B for '{module}'.")

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of the module at this path."""
        return self.weights[module, "A"], self.weights[module, "B"]

    def alpha(self, module: str) -> float:
        """alpha of this module; with rsLoRA the equivalent one, so that scaling is always alpha / R."""
        alpha = float(_look_up(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        rank = self.weights[module, "A"].shape[0]
        # Kalajdzievski 2023 (arXiv 2312.03732): alpha / sqrt(R) in place of alpha / R
        return alpha * rank**0.5 if self.config.get("use_rslora") else alpha

    def scaling(self, module: str) -> float:
        """What B A is multiplied by."""
        return self.alpha(module) / self.weights[module, "A"].shape[0]


def _look_up(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that, as an expression, ends the module path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_weights(path: Path) -> dict[tuple[str, str], Tensor]:
    if not path.exists():
        other = path.with_name("adapter_model.bin")
        hint = " There is an adapter_model.bin, which is a pickle and is not read: save it as safetensors."
        raise UsageError(f"{path} does not exist.{hint if other.exists() else ''}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}.") from error
    weights = {}
    for key, tensor in tensors.items():
        if not (match := _KEY.fullmatch(key)):
            raise UsageError(f"{path} holds '{key}', which is not a LoRA weight that lory knows.")
        weights[match["module"], match["part"]] = tensor
    if not weights:
        raise UsageError(f"{path} holds no tensors.")
    return weights


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json, refused when it asks for something that would be left out in silence."""
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UsageError(f"{folder / CONFIG_FILE} has no 'peft_type'; it is not an adapter's config.")
    if config["peft_type"] != "LORA":
        raise UsageError(f"{folder} is a {config['peft_type']} adapter; LORA is what lory reads.")
    for key, unused in _UNSUPPORTED.items():
        if config.get(key) not in unused:
            raise UsageError(f"{folder / CONFIG_FILE} sets {key}={config[key]!r}, which lory does not read yet.")
    if "lora_alpha" not in config:
        raise UsageError(f"{folder / CONFIG_FILE} has no 'lora_alpha'.")
    return config


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter on `model` into an existing folder, as PEFT would.

    Args:
        base: what `base_model_name_or_path` says: where the base model is to be found.
    """
    layers = dict(adapted_layers(model))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    ranks = Counter(layer.r for layer in layers.values())
    alphas = Counter(layer.lora_alpha for layer in layers.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": next(iter(layers.values())).lora_dropout,
        "target_modules": _shorten(list(layers), model),
        "rank_pattern": {re.escape(name): layer.r for name, layer in layers.items() if layer.r != rank},
        "alpha_pattern": {re.escape(n): layer.lora_alpha for n, layer in layers.items() if layer.lora_alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, config)


def _shorten(names: list[str], model: nn.Module) -> list[str]:
    """The last parts of the paths where these mean the same layers, else the whole paths (PEFT matches endings)."""
    chosen = set(names)
    endings = {name.rpartition(".")[2] for name in names}
    same = all(name in chosen for name in list_linears(model) if name.rpartition(".")[2] in endings)
    return sorted(endings) if same else sorted(names)


def load_adapter(model: nn.Module, folder: Path, trainable: bool = False) -> None:
    """Put the adapter in `folder` on `model`, in place.

    Raises:
        UsageError: the model lacks a layer that the adapter has, or the shapes differ.
    """
    files = AdapterFiles(folder)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [module for module in files.modules if module not in layers]:
        raise UsageError(
            f"{folder} adapts '{missing[0]}' and {len(missing) - 1} more layers that this model does not have; "
            f"it was made for {files.config.get('base_model_name_or_path') or 'another model'}."
        )
    model.requires_grad_(False)
    dropout = float(files.config.get("lora_dropout") or 0.0)
    for name in files.modules:
        lora_A, lora_B = files.factors(name)
        layer = replace_linear(model, name, lora_A.shape[0], files.alpha(name), dropout)
        if layer.lora_A.shape != lora_A.shape or layer.lora_B.shape != lora_B.shape:
            raise UsageError(
                f"{folder} has A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)} for '{name}', a layer of "
                f"{layer.in_features} inputs and {layer.out_features} outputs; it was made for another model."
            )
        with torch.no_grad():
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(lora_B)
        layer.lora_A.requires_grad = layer.lora_B.requires_grad = trainable
