"""Weights of other tools' training checkpoints (.pth, .pt, .bin, .safetensors), and the way to Hugging Face folders."""

from __future__ import annotations

import pickle
import re
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lory.adapters.factors import PREFIX, Adapter, Factors, write_adapter
from lory.architectures import find_model_class
from lory.runtime import LoryError, UsageError, read_json, write_aside, write_json

DEFAULT_SHARD_BYTES = 5_000_000_000

# Where tools put the weights, and what they put before all names: DDP and DeepSpeed, torch.compile
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")
_SHELLS = ("module.", "_orig_mod.")
# What trainers name the model that they hold; only taken off when the names are then the model's own
_OWNERS = ("model.", "llm.", "language_model.", "base_model.model.", "transformer.")
_HEAD = "lm_head.weight"
# Made anew from the config by every model
_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>.+)")
_NOT_COPIED = (
    *("config.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
    *("*.index.json", "adapter_config.json", "MANIFEST.json", "trainer_state.json", "README*"),
)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors by name, and what else it held (optimizer state, counters) or was told to leave out."""

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]
    where: Path

    def rename(self, rules: Sequence[tuple[re.Pattern[str], str]]) -> Weights:
        """Apply substitutions to all names, in turn; each must change something, and no two names become one."""
        names = {name: name for name in self.tensors}
        for pattern, new in rules:
            after = {old: pattern.sub(new, name) for old, name in names.items()}
            if after == names:
                raise UsageError(f"--rename '{pattern.pattern}' matches no name in {self.where}, as in {_some(names)}.")
            names = after
        name, count = Counter(names.values()).most_common(1)[0]
        if count > 1:
            raise UsageError(f"After the renaming, {count} tensors of {self.where} are called '{name}'.")
        return replace(self, tensors={names[name]: tensor for name, tensor in self.tensors.items()})

    def ignore(self, patterns: Sequence[str]) -> Weights:
        """Leave out the tensors whose whole names match one of these expressions; each must match something."""
        tensors, left_out = dict(self.tensors), list(self.left_out)
        for pattern in patterns:
            matched = [name for name in tensors if compile_pattern(pattern, "--ignore").fullmatch(name)]
            if not matched:
                raise UsageError(f"--ignore '{pattern}' matches no whole name in {self.where}, as {_some(tensors)}.")
            for name in matched:
                del tensors[name]
            left_out += matched
        return replace(self, tensors=tensors, left_out=tuple(left_out))


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:3]) or "none"


def compile_pattern(text: str, option: str) -> re.Pattern[str]:
    """A regular expression; a broken one is a `UsageError` that names the option it came from."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{option} is '{text}', a broken regular expression: {error}.") from error


def parse_rename(text: str) -> tuple[re.Pattern[str], str]:
    """``OLD=NEW``, where OLD is a regular expression and NEW may name its groups, as in ``^model\\.=``."""
    old, equals, new = text.rpartition("=")
    if not equals or not old:
        raise UsageError(f"--rename is '{text}'; OLD=NEW is expected, as in '^model\\.=' to take off a prefix.")
    return compile_pattern(old, "--rename"), new


def read_weights(path: Path) -> Weights:
    """Read a checkpoint: one file, or a folder with pytorch_model*.bin or DeepSpeed's mp_rank_00_model_states.pt.

    Nothing but tensors and plain values is unpickled, and files of torch's zip format are mapped rather than read.

    Raises:
        UsageError: there are no weights, or more than plain values, or they are one rank's part of a sharded model.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist.")
    files = [path] if path.is_file() else _list_files(path)
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for file in files:
        loaded = _load_safetensors(file) if file.suffix == ".safetensors" else _load_torch(file)
        found, rest = _unwrap(loaded, file)
        if clash := tensors.keys() & found.keys():
            raise UsageError(f"{file} holds '{min(clash)}' a second time.")
        tensors |= found
        left_out += rest
    for shell in _SHELLS * 2:  # compiled inside DDP, and the other way round
        if all(name.startswith(shell) for name in tensors):
            tensors = {name.removeprefix(shell): tensor for name, tensor in tensors.items()}
    return Weights(tensors, tuple(left_out), path)


def _list_files(folder: Path) -> list[Path]:
    if any(folder.glob("*zero_pp_rank_*model_states.pt")):
        raise UsageError(f"{folder} is a ZeRO-3 checkpoint; run the zero_to_fp32.py in it first, and convert that.")
    ranks = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(ranks) > 1:
        raise UsageError(f"{folder} has {len(ranks)} tensor-parallel parts; gather them with the tool that made them.")
    if files := ranks or sorted(folder.glob("pytorch_model*.bin")):
        return files
    raise UsageError(f"{folder} has neither pytorch_model*.bin nor mp_rank_00_model_states.pt; give the weights' file.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}.") from error


def _load_torch(path: Path) -> Any:
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported (?:global|class))[: ]+(?:GLOBAL )?`?([\w.]+)", str(error))
        what = f"'{found[1]}'" if found else "something that is not a tensor or a plain value"
        raise UsageError(
            f"{path} holds {what}, which is not unpickled, since that can run code; where you trust the file, save "
            "its state dict alone with torch.save."
        ) from error
    # what torch's reader meets in a file that is cut off or something else altogether
    except (RuntimeError, EOFError, LookupError, ValueError, struct.error) as error:
        raise UsageError(f"{path} is not a whole file of torch.save ({type(error).__name__}).") from error


def _unwrap(value: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a checkpoint, and the names of what lies beside it."""
    left_out: list[str] = []
    while isinstance(value, Mapping):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return {str(name): tensor for name, tensor in value.items()}, left_out
        inner = next((key for key in _WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        left_out += [str(key) for key in value if key != inner]
        value = value[inner]
    raise UsageError(f"{path} holds no state dict (names and tensors), neither by itself nor under {_WRAPPERS}.")


def holds_lora(weights: Weights) -> bool:
    """Whether these are the weights of a PEFT adapter, perhaps among others."""
    return any(_LORA.fullmatch(name) for name in weights.tensors)


def convert_lora_checkpoint(
    weights: Weights, out: Path, alpha: float, base: str | None = None, adapter_name: str | None = None
) -> Adapter:
    """Write the PEFT adapter in a training checkpoint as an adapter folder.

    Args:
        alpha: the LoRA alpha it was trained with, which such files do not hold; the scaling is alpha / rank.
        base: what base_model_name_or_path shall say.
        adapter_name: which adapter, where there are several.

    Raises:
        UsageError: something else is in the checkpoint too (see `Weights.ignore`), or parts of several models.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    whole: dict[str, None] = {}
    parameters: dict[str, Tensor] = {}
    for name, tensor in _choose_adapter(_strip_to_model(weights), adapter_name, weights.where).items():
        if match := _LORA.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        elif match := _WHOLE.fullmatch(name):
            whole[match["module"]] = None
            parameters[f"{match['module']}.{match['parameter']}"] = tensor
        elif name.rpartition(".")[2] == "bias":
            parameters[name.replace(".base_layer.", ".")] = tensor
        else:
            raise UsageError(
                f"{weights.where} holds '{name}' beside the adapter, which has no place in an adapter folder; leave it "
                "out with --ignore, as in --ignore '.*base_layer.*' for the base model's own weights."
            )
    layers = {}
    for module, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UsageError(f"{weights.where} has no lora_A (R, in) and lora_B (out, R) that match for '{module}'.")
        layers[module] = Factors(pair["A"], pair["B"], alpha, module in embeddings)
    adapter = Adapter(layers, parameters, tuple(whole), base)
    with write_aside(out) as aside:
        write_adapter(aside, adapter)
    return adapter


def _strip_to_model(weights: Weights) -> dict[str, Tensor]:
    """The tensors by their paths in the adapted model: without what stands up to PEFT's base_model.model."""
    owners = {name.partition(PREFIX)[0] if PREFIX in name else None for name in weights.tensors}
    if owners == {None}:
        return weights.tensors
    if len(owners) > 1:
        outside = [name for name in weights.tensors if PREFIX not in name]
        parts = sorted(owner for owner in owners if owner is not None)
        what = f"'{outside[0]}' outside of an adapter" if outside else f"adapters of several models ({parts})"
        raise UsageError(f"{weights.where} holds {what}; convert one at a time, with --ignore for the others.")
    return {name.partition(PREFIX)[2]: tensor for name, tensor in weights.tensors.items()}


def _choose_adapter(tensors: Mapping[str, Tensor], wanted: str | None, where: Path) -> dict[str, Tensor]:
    """The tensors without those of adapters that are not wanted; several adapters and no wish is an error."""
    matches = {name: _LORA.fullmatch(name) or _WHOLE.fullmatch(name) for name in tensors}
    owner = {name: match["adapter"] if match else None for name, match in matches.items()}
    found = {adapter for adapter in owner.values() if adapter}
    if wanted is None and len(found) > 1:
        raise UsageError(f"{where} holds adapters {', '.join(sorted(found))}; say which with --adapter-name.")
    if wanted is not None and wanted not in found:
        raise UsageError(f"{where} holds no adapter '{wanted}'; there are: {', '.join(sorted(found)) or 'unnamed'}.")
    return {name: tensor for name, tensor in tensors.items() if owner[name] in (None, wanted or owner[name])}


def convert_model_checkpoint(
    weights: Weights,
    base: Path,
    out: Path,
    fp32: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Write a full model's weights as a model folder with `base`'s config and tokenizer.

    Args:
        base: a model folder of the same architecture and size; its own weights are neither needed nor used.
        fp32: store floating-point tensors as fp32 instead of in their own precision.
        progress: called with (done, total) tensors.
        trust_remote_code: let `base`'s own Python code say what a model of its config has, where it has no weights.

    Returns:
        How many files of weights there are, and the tensors left out since every model makes them anew.

    Raises:
        UsageError: a tensor is missing, has another shape, or belongs to nothing in the model.
    """
    config = read_json(base / "config.json")
    wanted = _list_shapes(base, config, trust_remote_code)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not _COMPUTED.fullmatch(name)}
    computed = tuple(sorted(weights.tensors.keys() - tensors.keys()))
    tensors = _fit_names(tensors, wanted)
    tensors = _untie(tensors, wanted, weights.where)
    _check_fit(tensors, wanted, weights.where, base)
    kinds = {n: torch.float32 if fp32 and t.is_floating_point() else t.dtype for n, t in tensors.items()}
    meta = {name: torch.empty(t.shape, dtype=kinds[name], device="meta") for name, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    floats = {kind for kind in kinds.values() if kind.is_floating_point}
    with write_aside(out) as aside:
        done = 0
        for file, names in plan.filename_to_tensors.items():
            _save({name: tensors[name].to(kinds[name], copy=True) for name in names}, aside / file)
            done += len(names)
            if progress:
                progress(done, len(tensors))
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(aside / "model.safetensors.index.json", index)
        if len(floats) == 1:
            config.pop("torch_dtype", None)
            config["dtype"] = str(floats.pop()).removeprefix("torch.")
        write_json(aside / "config.json", config)
        for path in sorted(base.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
                shutil.copyfile(path, aside / path.name)
    return len(plan.filename_to_tensors), computed


def _save(shard: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise LoryError(f"Could not write {path}: {error}.") from error


def _list_shapes(base: Path, config: Mapping[str, Any], trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of what a model stores, a tied head excluded: by its own weights, else by its architecture."""
    files = sorted(base.glob("*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    tied = config.get("tie_word_embeddings")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    if not files:
        from transformers import AutoConfig

        try:
            with torch.device("meta"):
                settings = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
                model = find_model_class(settings).from_config(settings, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise UsageError(
                f"{base} has no weights to compare names with, and its architecture is not one of transformers' causal "
                "language models; give a model folder with weights."
            ) from error
        tied = model.config.tie_word_embeddings
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        shapes.pop(_HEAD, None)
    return shapes


def _fit_names(tensors: dict[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take off what trainers put before all names, as long as more names are then the model's own."""
    best, count = tensors, len(tensors.keys() & wanted.keys())
    candidate = tensors
    while prefix := next((p for p in _OWNERS if all(name.startswith(p) for name in candidate)), None):
        candidate = {name.removeprefix(prefix): tensor for name, tensor in candidate.items()}
        if (found := len(candidate.keys() & wanted.keys())) > count:
            best, count = candidate, found
    return best


def _untie(tensors: dict[str, Tensor], wanted: Mapping[str, Any], where: Path) -> dict[str, Tensor]:
    """Without the head where it is the embeddings' weight; a head of its own on a tied model is refused."""
    head = tensors.get(_HEAD)
    if head is None or _HEAD in wanted:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    if any(tensor.shape == head.shape and torch.equal(tensor, head) for tensor in rest.values()):
        return rest
    raise UsageError(
        f"{where} has an {_HEAD} that differs from the embeddings, but the model's config ties the two; set "
        "tie_word_embeddings to false in its config.json."
    )


def _check_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: Path, base: Path) -> None:
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UsageError(
            f"{where} lacks '{missing[0]}' and {len(missing) - 1} more of the model in {base}; it has names such as "
            f"{_some(tensors)}. Map them with --rename, or give the model that it was trained from."
        )
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise UsageError(
            f"{where} holds '{unknown[0]}' and {len(unknown) - 1} more that the model in {base} does not have; leave "
            "them out with --ignore, or give the model that it was trained from."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name]:
            raise UsageError(
                f"'{name}' is {tuple(tensor.shape)} in {where} and {wanted[name]} in {base}; give a config of the same "
                "sizes (vocab_size, where tokens were added)."
            )
