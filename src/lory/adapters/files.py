"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lory.lora as lora
from lory.adapters.inject import (
    Settings,
    Trained,
    adapt,
    adapted_layers,
    keep_scale,
    set_parameter,
    whole_tensors,
)
from lory.adapters.layout import find_name
from lory.adapters.targets import Target, ends_with, list_targets, look_up, parameter_kind
from lory.lora.layer import LoRALayer, scale_of
from lory.lora.parameter import ParameterLoRA
from lory.runtime import UsageError, read_json, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)

# Keys of PEFT's config that are read, or say nothing about what the stored weights mean
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_dora",
    "use_rslora",
}
# These change the base model, so that the stored weights don't fit the original one
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterFiles:
    """An adapter folder, read: PEFT's config, the adapters' weights by module path, and tensors stored as a whole.

    `weights` has parts A, B and, for DoRA, magnitude (outputs,). A is (R, in) and B (out, R); convolutions' are
    flattened; an embedding's are (R, rows) and (columns, R). Bare parameters go by the path of their module, as PEFT
    nests them, until `name_parameters` has seen the model. `whole` goes by the names of the model's state dict.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stored = read_stored(folder)
        self.config = stored.config
        self.embeddings, self.whole = stored.embeddings, stored.whole
        self.weights = {
            (module, part): tensor.flatten() if part == "magnitude" else tensor.flatten(1)
            for (module, part), tensor in stored.weights.items()
        }

    @property
    def modules(self) -> list[str]:
        """Paths of what is adapted."""
        return sorted({module for module, _ in self.weights})

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of the module at this path; (E, R, in) and (E, out, R) of stacked experts."""
        return self.weights[module, "A"], self.weights[module, "B"]

    def magnitude(self, module: str) -> Tensor | None:
        """DoRA's lengths of the rows, (outputs,); None without DoRA."""
        return self.weights.get((module, "magnitude"))

    def rank(self, module: str) -> int:
        """R of this module."""
        return self.weights[module, "A"].shape[-2]

    def alpha(self, module: str) -> float:
        """alpha of this module."""
        return look_up_alpha(self.config, module)

    @property
    def rslora(self) -> bool:
        """Whether scaling is alpha / sqrt(R) in place of alpha / R."""
        return bool(self.config.get("use_rslora"))

    def scaling(self, module: str) -> float:
        """What B A is multiplied by."""
        return scale_of(self.rank(module), self.alpha(module), self.rslora)

    def name_parameters(self, model: nn.Module) -> None:
        """Give what older transformers called otherwise, and adapters of bare parameters, the model's own paths.

        PEFT nests the latter: of a module's n adapted parameters, in their order, the k-th lies under n - k times
        ``base_layer``. `model` is the plain one; one on the meta device will do.

        Raises:
            UsageError: the model has no such parameters.
        """
        self._rename_old(model)
        wanted = self.config.get("target_parameters") or []
        targets = list_targets(model) if wanted else {}
        for module in self.modules if wanted else ():
            owner = re.sub(r"(\.base_layer)+$", "", module)
            if module in targets and not targets[module].owner:
                continue
            names = [t for t in targets.values() if t.owner == owner and any(ends_with(t.path, w) for w in wanted)]
            depth = module[len(owner) :].count(".base_layer")
            if depth >= len(names):
                raise UsageError(f"{self.folder} adapts parameters of '{owner}' that this model does not have.")
            self._rename(module, names[-1 - depth])

    def _rename_old(self, model: nn.Module) -> None:
        modules, known = dict(model.named_modules()), model.state_dict()
        paths = {module: module for module in self.modules}
        for module in paths.keys() - modules.keys():
            name = find_name(model, f"{module}.weight", known)
            if name in known:
                paths[module] = name.removesuffix(".weight")
        self.weights = {(paths[module], part): tensor for (module, part), tensor in self.weights.items()}
        self.embeddings = {paths[module] for module in self.embeddings}
        self.whole = {find_name(model, name, known): tensor for name, tensor in self.whole.items()}

    def _rename(self, module: str, target: Target) -> None:
        lora_A, lora_B = self.weights.pop((module, "A")), self.weights.pop((module, "B"))
        if target.kind == "experts":
            experts = target.shape[0]
            if lora_A.shape[0] % experts or lora_A.shape[0] != lora_B.shape[1]:
                raise UsageError(f"{self.folder} has '{target.path}' for another number of experts than {experts}.")
            lora_A = lora_A.view(experts, -1, lora_A.shape[-1])
            lora_B = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1)
        self.weights[target.path, "A"], self.weights[target.path, "B"] = lora_A, lora_B


@dataclass(frozen=True)
class Stored:
    """What an adapter folder holds, each tensor in the shape that it is stored in."""

    config: dict[str, Any]
    weights: dict[tuple[str, str], Tensor]
    """By module path and part: A, B and, for DoRA, magnitude."""
    embeddings: set[str]
    """The modules among them that are embeddings."""
    whole: dict[str, Tensor]
    """Tensors stored as a whole, by their names in the model's state dict."""


def read_stored(folder: Path) -> Stored:
    """A LoRA adapter's config and tensors.

    Raises:
        UsageError: a file is missing or broken, or something in it would be left out in silence.
    """
    path = folder / WEIGHTS_FILE
    stored = Stored(read_adapter_config(folder), {}, set(), {})
    for key, tensor in load_tensors(path).items():
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(name):
            if match["embedding"]:
                stored.embeddings.add(match["module"])
            stored.weights[match["module"], match["part"] or match["embedding"] or "magnitude"] = tensor
        elif name == key or re.search(r"(^|\.)(lora_|token_adapter\.)", name):
            raise UsageError(f"{path} holds '{key}', which is not a LoRA weight that lory knows.")
        else:
            # PEFT stores what lies inside of an adapted layer under base_layer
            stored.whole[name.replace(".base_layer.", ".")] = tensor
    for module, _ in stored.weights:
        if (module, "A") not in stored.weights or (module, "B") not in stored.weights:
            raise UsageError(f"{path} has only one of lora_A and lora_B for '{module}'.")
        if bool(stored.config.get("use_dora")) != ((module, "magnitude") in stored.weights):
            raise UsageError(f"{path} and {CONFIG_FILE} disagree whether '{module}' is DoRA (use_dora).")
    return stored


def load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        other = path.with_name("adapter_model.bin")
        hint = " There is an adapter_model.bin, which is a pickle and is not read: save it as safetensors."
        raise UsageError(f"{path} does not exist.{hint if other.exists() else ''}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}.") from error
    if not tensors:
        raise UsageError(f"{path} holds no tensors.")
    return tensors


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json, refused when it asks for something that would be left out in silence."""
    path = folder / CONFIG_FILE
    config = read_json(path)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UsageError(f"{path} has no 'peft_type'; it is not an adapter's config.")
    if config["peft_type"] != "LORA":
        raise UsageError(f"{folder} is a {config['peft_type']} adapter; LORA is what lory reads.")
    if "lora_alpha" not in config:
        raise UsageError(f"{path} has no 'lora_alpha'.")
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False, "", [], {}):
            raise UsageError(f"{path} sets {key}={value!r}, which lory does not read.")
    if str(config.get("init_lora_weights")).lower().startswith(_MUTATING):
        raise UsageError(
            f"{path} has init_lora_weights={config['init_lora_weights']!r}, whose weights fit a changed base model; "
            "save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    return config


def look_up_alpha(config: Mapping[str, Any], module: str) -> float:
    """alpha of a module by an adapter's config."""
    alpha = look_up(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not isinstance(alpha, int | float):
        raise UsageError(f"The adapter's config has lora_alpha={alpha!r} for '{module}'; a number is expected.")
    return float(alpha)


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter on `model` into an existing folder, as PEFT would.

    Args:
        base: what `base_model_name_or_path` says: where the base model is to be found.
    """
    layers = dict(adapted_layers(model))
    trained = whole_tensors(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        prefix = f"{PREFIX}{_module_path(model, path, layer)}."
        tensors |= {prefix + key: value for key, value in _layer_tensors(layer).items()}
    if trained.tensors:
        state = model.state_dict()
        for name in trained.tensors:
            parent, _, own = name.rpartition(".")
            # PEFT has what belongs to an adapted layer itself, such as its bias, under base_layer
            tensors[f"{PREFIX}{parent}{'.base_layer' if parent in layers else ''}.{own}"] = state[name]
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, _describe(model, layers, trained, base))


def _module_path(model: nn.Module, path: str, layer: LoRALayer) -> str:
    """Where PEFT keeps an adapter's weights; see `AdapterFiles.name_parameters`."""
    if not isinstance(layer, ParameterLoRA):
        return path
    owner, _, name = path.rpartition(".")
    order = [n for n, _ in model.get_submodule(owner).named_parameters(recurse=False)]
    adapted = [n for n in order if f"lora_{n}" in model.get_submodule(owner)._modules]
    return owner + ".base_layer" * (len(adapted) - 1 - adapted.index(name))


def _layer_tensors(layer: LoRALayer) -> dict[str, Tensor]:
    lora_A, lora_B = layer._factors() if isinstance(layer, lora.Linear) else (layer.lora_A, layer.lora_B)
    names = ("lora_A.weight", "lora_B.weight")
    magnitude = layer.lora_magnitude if layer.has_magnitude else None
    if isinstance(layer, lora.Embedding):
        names = ("lora_embedding_A", "lora_embedding_B")
    elif isinstance(layer, lora.ConvBase):
        *_, inputs = layer.weight.shape[:2]
        ones = (1,) * (layer.weight.dim() - 2)
        lora_A, lora_B = lora_A.view(-1, inputs, *layer.weight.shape[2:]), lora_B.view(*lora_B.shape, *ones)
        magnitude = None if magnitude is None else magnitude.view(1, -1, *ones)
    elif isinstance(layer, ParameterLoRA) and lora_A.dim() == 3:
        lora_A, lora_B = lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)
    tensors = dict(zip(names, (lora_A, lora_B), strict=True))
    return tensors if magnitude is None else tensors | {"lora_magnitude_vector": magnitude}


def _size(layer: LoRALayer) -> tuple[int, float]:
    """Rank and alpha as stored: a PiSSA adapter is stored as a plain one of twice the rank and the same scaling."""
    if not (isinstance(layer, lora.Linear) and layer.has_start):
        return layer.r, layer.lora_alpha
    return 2 * layer.r, layer.lora_alpha * (math.sqrt(2) if layer.rslora else 2)


def _describe(model: nn.Module, layers: Mapping[str, LoRALayer], trained: Trained, base: str) -> dict[str, Any]:
    sizes = {path: _size(layer) for path, layer in layers.items()}
    rank = Counter(rank for rank, _ in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in sizes.values()).most_common(1)[0][0]
    parameters = _list_parameters(model, layers)
    modules = [path for path in layers if path not in parameters and f"{path}.weight" not in parameters]
    plain = [layer for layer in layers.values() if not isinstance(layer, ParameterLoRA)]
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": tidy_number(alpha),
        # PEFT refuses any dropout where bare parameters are adapted
        "lora_dropout": max((layer.lora_dropout for layer in plain), default=0.0) if not parameters else 0.0,
        "target_modules": _shorten(modules, model),
        "target_parameters": parameters or None,
        "rank_pattern": {re.escape(path): r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {re.escape(path): tidy_number(a) for path, (_, a) in sizes.items() if a != alpha},
        "bias": trained.bias,
        "fan_in_fan_out": any(isinstance(layer, lora.Linear) and layer.fan_in_fan_out for layer in plain),
        "use_rslora": any(layer.rslora for layer in layers.values()),
        "use_dora": any(layer.has_magnitude for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": trained.modules or None,
        "inference_mode": True,
    }


def tidy_number(value: float) -> float | int:
    """The number as an int where it is whole, as configs have it."""
    return int(value) if float(value).is_integer() else value


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type; None where its wrapper for a task would not fit the model."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


def _list_parameters(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """What has to be named in target_parameters: bare parameters, and layers whose names PEFT takes for experts."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    bare = [path for path, layer in layers.items() if isinstance(layer, ParameterLoRA)]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not model_type or any(layer.has_magnitude for layer in layers.values()):
        return bare
    # PEFT takes these names, wherever they stand, for those of the experts that such models had before transformers 5
    stale = {
        pattern.rpartition(".weight")[0].rpartition(".")[2]
        for conversion in get_checkpoint_conversion_mapping(model_type) or ()
        for pattern in conversion.source_patterns
        if "experts." in pattern
    } | {"gate"}
    renamed = [path for path, layer in layers.items() if path.rpartition(".")[2] in stale and path not in bare]
    return bare + ([f"{path}.weight" for path in renamed] if len(stale) > 1 else [])


def _shorten(paths: list[str], model: nn.Module) -> list[str]:
    """The last parts of the paths where these mean the same modules, else the whole paths (PEFT matches endings)."""
    chosen = set(paths)
    endings = {path.rpartition(".")[2] for path in paths}
    same = all(path in chosen for path, _ in model.named_modules() if path.rpartition(".")[2] in endings)
    return sorted(endings) if same else sorted(paths)


def load_adapter(model: nn.Module, folder: Path, trainable: bool = False) -> None:
    """Put the adapter in `folder` on `model`, in place.

    Raises:
        UsageError: the model lacks a layer that the adapter has, or the shapes differ.
    """
    files = AdapterFiles(folder)
    files.name_parameters(model)
    targets = list_targets(model)
    if missing := [module for module in files.modules if module not in targets]:
        carried = dict(adapted_layers(model))
        if missing[0] in carried:
            raise UsageError(f"'{missing[0]}' carries an adapter already; load the base model afresh.")
        raise UsageError(
            f"{folder} adapts '{missing[0]}' and {len(missing) - 1} more layers that this model does not have; "
            f"it was made for {files.config.get('base_model_name_or_path') or 'another model'}."
        )
    model.requires_grad_(False)
    keep_scale(model)
    dropout = float(files.config.get("lora_dropout") or 0.0)
    for module in files.modules:
        target = targets[module]
        usable = 0.0 if target.owner else dropout
        how = Settings(files.rank(module), files.alpha(module), usable, files.rslora)
        layer = adapt(model, target, how)
        if (magnitude := files.magnitude(module)) is not None:
            try:
                layer.add_magnitude(magnitude)
            except ValueError as error:
                raise UsageError(f"{folder} does not fit '{module}': {error} It was made for another model.") from error
        _copy_weights(files, module, layer)
        for parameter in layer.parameters(recurse=False):
            if parameter.dtype.is_floating_point:
                parameter.requires_grad = trainable
        _freeze_base(layer)
    _load_whole(model, files, trainable)


def _freeze_base(layer: LoRALayer) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        if not name.startswith("lora_"):
            parameter.requires_grad = False


def _check_shape(folder: Path, name: str, own: Tensor, stored: Tensor) -> None:
    if own.shape != stored.shape:
        raise UsageError(
            f"{folder} has {tuple(stored.shape)} for '{name}', where this model has {tuple(own.shape)}; it was made "
            "for another model."
        )


@torch.no_grad()
def _copy_weights(files: AdapterFiles, module: str, layer: LoRALayer) -> None:
    lora_A, lora_B = files.factors(module)
    if (module in files.embeddings) != isinstance(layer, lora.Embedding):
        raise UsageError(f"{files.folder} and this model disagree whether '{module}' is an embedding.")
    if isinstance(layer, lora.Linear) and layer.has_start:
        layer.set_start(lora_A[layer.r :].to(layer.lora_A), -lora_B[:, layer.r :].to(layer.lora_B))
        lora_A, lora_B = lora_A[: layer.r], lora_B[:, : layer.r]
    for own, stored in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        _check_shape(files.folder, module, own, stored)
        own.copy_(stored)
    if (magnitude := files.magnitude(module)) is not None:
        layer.lora_magnitude.copy_(magnitude)


def _load_whole(model: nn.Module, files: AdapterFiles, trainable: bool) -> None:
    """Put tensors that are stored as a whole in the place of the model's own; tied copies keep the old ones."""
    if not files.whole:
        return
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = whole_tensors(model)
    for name, tensor in files.whole.items():
        if name not in state:
            raise UsageError(f"{files.folder} holds '{name}', which this model does not have.")
        own = state[name]
        _check_shape(files.folder, name, own, tensor)
        value = tensor.to(own.device, own.dtype)
        if name in parameters:
            set_parameter(model, name, value, trainable)
        else:
            own.copy_(value)
        trained.tensors.append(name)
    trained.modules += list(files.config.get("modules_to_save") or [])
    trained.bias = files.config.get("bias") or "none"


def restore_adapter(model: nn.Module, folder: Path) -> None:
    """Set what `attach_lora` put on `model` to what was stored, to go on training.

    Raises:
        UsageError: other layers were stored than the model has adapters on, or other shapes.
    """
    files = AdapterFiles(folder)
    layers = dict(adapted_layers(model))
    _name_adapted(files, model, layers)
    trained = whole_tensors(model)
    if sorted(layers) != files.modules or sorted(trained.tensors) != sorted(files.whole):
        raise UsageError(f"{folder / WEIGHTS_FILE} adapts other layers than this config does; resume its own run.")
    for path, layer in layers.items():
        _copy_weights(files, path, layer)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in files.whole.items():
            _check_shape(folder, name, state[name], tensor)
            state[name].copy_(tensor)


def _name_adapted(files: AdapterFiles, model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """`AdapterFiles.name_parameters` where the adapters are on the model already."""
    for path, layer in layers.items():
        if isinstance(layer, ParameterLoRA):
            owner, _, name = path.rpartition(".")
            stored = _module_path(model, path, layer)
            weight = model.get_submodule(owner)._parameters[name]
            if weight is not None and (stored, "A") in files.weights:
                files._rename(stored, Target(path, parameter_kind(weight), tuple(weight.shape), owner))
