"""Training the model's own weights: all of them (`full`), or a part (`freeze`). A checkpoint is a model folder.

Half-precision weights lose updates smaller than 1/256 (bf16) of themselves; `lory.training.masters` keeps fp32 copies
of what is trained, so the model can stay in the precision that it computes in and is stored in.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lory.adapters.inject import Match, frozen_parts
from lory.adapters.targets import find_parts, layer_number
from lory.config import Section
from lory.runtime import LoryError, UsageError, log, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BIASES = "biases"
MAX_SHARD_BYTES = 5_000_000_000
_INDEX_FILE = "model.safetensors.index.json"


class FullConfig(Section):
    """Every parameter is trained, norms and embeddings included."""

    type: Literal["full"] = Field("full", description="The whole model is trained.")
    freeze_vision: bool = Field(False, description="Of a model that sees: leave its vision tower as it is.")
    freeze_projector: bool = Field(
        False, description="The same for what lies between its tower and its language model."
    )


class FreezeConfig(Section):
    """A part of the model's own parameters is trained, the rest is frozen."""

    type: Literal["freeze"] = Field("freeze", description="A part of the model's own parameters is trained.")
    last_layers: int | None = Field(None, ge=1, description="Train this many of the last decoder layers.")
    trainable: str | None = Field(
        None,
        description="Train the parameters whose whole names this regular expression matches, or biases: all biases and "
        "nothing else (BitFit). With last_layers, both are trained.",
    )

    @field_validator("trainable")
    @classmethod
    def _check_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"a regular expression is expected, and this one is broken: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_choice(self) -> FreezeConfig:
        if self.last_layers is None and self.trainable is None:
            raise ValueError("freeze needs last_layers or trainable, to know what is trained")
        return self


def attach(model: PreTrainedModel, config: FullConfig | FreezeConfig) -> list[Match]:
    """Set what is trained, in place; returns one `Match` for each module with trained parameters of its own.

    Raises:
        UsageError: nothing matches, there are fewer layers than asked for, or the weights are quantized.
    """
    _check_precision(model)
    # tied parameters have several names, and each of them is as good as the other
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = set(named) if isinstance(config, FullConfig) else _choose(model, list(named), config)
    if isinstance(config, FullConfig) and (frozen := frozen_parts(config)):
        part_of = find_parts(model)
        chosen = {name for name in chosen if part_of(name) not in frozen}
    model.requires_grad_(False)
    for name in chosen:
        named[name].requires_grad = True
    for name, source in model.all_tied_weights_keys.items():
        if (name in chosen) != (source in chosen):
            log.info("'%s' and '%s' are the same (tied), so both are trained.", name, source)
    return _list_matches(model)


def _check_precision(model: nn.Module) -> None:
    kinds = {parameter.dtype: name for name, parameter in model.named_parameters()}
    for kind, name in kinds.items():
        if not kind.is_floating_point or kind.itemsize < 2:
            raise UsageError(
                f"'{name}' is quantized ({kind}), and quantized weights cannot be trained; load the 16- or 32-bit "
                "model, or set adapter.type to lora."
            )
    if torch.float16 in kinds:
        log.warning("The model is float16, in which small gradients vanish; set model.dtype to bfloat16 or float32.")


def _choose(model: PreTrainedModel, names: Sequence[str], config: FreezeConfig) -> set[str]:
    """Names of the parameters to train."""
    chosen: set[str] = set()
    if config.last_layers is not None:
        layers = _list_layers(model)
        if config.last_layers > len(layers):
            raise UsageError(
                f"adapter.last_layers is {config.last_layers}, and {type(model).__name__} has {len(layers)} layers; "
                "give a smaller number, or set adapter.type to full."
            )
        last = tuple(f"{path}." for path in layers[-config.last_layers :])
        chosen |= {name for name in names if name.startswith(last)}
    if config.trainable is not None:
        expression = r"(.*[._])?bias" if config.trainable == BIASES else config.trainable
        matched = {name for name in names if re.fullmatch(expression, name)}
        if not matched:
            raise _nothing_matched(names, config.trainable)
        chosen |= matched
    return chosen


def _list_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the decoder's layers, first to last."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    stacks = {
        path: len(module)
        for path, module in model.named_modules()
        # a list that stands in a layer is no list of layers
        if isinstance(module, nn.ModuleList) and id(module) in inside and layer_number(path) is None
    }
    if not stacks:
        raise UsageError(
            f"{type(model).__name__} has no list of layers that lory could find; name what is trained in "
            "adapter.trainable instead of adapter.last_layers."
        )
    longest = max(stacks, key=lambda path: stacks[path])
    return [f"{longest}.{number}" for number in range(stacks[longest])]


def _nothing_matched(names: Sequence[str], trainable: str) -> UsageError:
    counts = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    there = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
    what = "and the model has no biases" if trainable == BIASES else "which matches no parameter's whole name"
    return UsageError(f"adapter.trainable is '{trainable}', {what}. There are: {there}.")


def _list_matches(model: nn.Module) -> list[Match]:
    matches, seen = [], set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        trained = {name: p for name, p in own.items() if p.requires_grad and id(p) not in seen}
        if not trained:
            continue
        seen |= {id(parameter) for parameter in trained.values()}
        which = "" if len(trained) == len(own) else f" ({', '.join(trained)})"
        shape = tuple(next(iter(trained.values())).shape)
        size = sum(parameter.numel() for parameter in trained.values())
        matches.append(Match(path, type(module).__name__ + which, shape, 0, size))
    return matches


def save(model: PreTrainedModel, folder: Path, base: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the model into an existing folder as transformers would: configs, and weights in safetensors shards.

    A shard at a time is brought to the CPU and into the names and shapes that the model's files have (stacked experts
    apart, say); tied weights are written once.

    Args:
        base: not written, since a whole model needs no other; here because every kind of adapter is saved alike.

    Raises:
        LoryError: a file could not be written.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    _write_configs(model, folder)
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, model)
    shards = _plan_shards(state, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"model{suffix}.safetensors"
        stored = revert_weight_conversion(model, {name: state[name] for name in names})
        _write_shard(stored, path)
        weight_map |= dict.fromkeys(stored, path.name)
    # also for a single file: without an index, vLLM and SGLang would take the optimizer's file for weights, too
    size = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / _INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _plan_shards(state: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in each file. A layer is never cut, since its weights may have to be brought into their form together."""

    def layer_of(name: str) -> str:
        match = re.match(r".*?\.\d+(?=\.)", name)
        return match[0] if match else name

    shards: list[list[str]] = [[]]
    size = 0
    for _, group in itertools.groupby(state, layer_of):
        names = list(group)
        more = sum(state[name].nbytes for name in names)
        if shards[-1] and size + more > max_bytes:
            shards.append([])
            size = 0
        shards[-1] += names
        size += more
    return shards


def _write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise LoryError(f"Could not write {path}: {error}.") from error
    # safetensors makes files that only their owner can read
    shutil.copymode(path.with_name("config.json"), path)


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Set `model`'s weights to those that `save` wrote, bit for bit; its parameters stay the same objects.

    Raises:
        UsageError: the folder holds another model, or a broken one; `model` may be half changed then.
    """
    stored = _read_model(model, folder)
    if stored.all_tied_weights_keys != model.all_tied_weights_keys:
        raise UsageError(f"{folder} ties other weights than this model does; resume its own run.")
    theirs = stored.state_dict()
    for name, own in model.state_dict().items():
        if name not in theirs or theirs[name].shape != own.shape:
            raise UsageError(f"{folder} has no '{name}' of shape {tuple(own.shape)}; resume its own run.")
        own.copy_(theirs[name])


def _read_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The stored model, on the CPU; its weights are mapped from the files where they need no conversion."""
    from transformers.utils import logging as transformers_logging

    kinds = [tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()]
    # transformers loads all in one precision: the widest keeps every bit of the others
    dtype = max(kinds, key=lambda kind: kind.itemsize)
    dtype = torch.promote_types(dtype, torch.float32) if len(set(kinds)) > 1 else dtype
    transformers_logging.disable_progress_bar()
    try:
        stored, report = type(model).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder} could not be loaded as a {type(model).__name__}: {first}") from error
    finally:
        transformers_logging.enable_progress_bar()
    if wrong := sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]):
        raise UsageError(
            f"{folder} and {type(model).__name__} disagree on {len(wrong)} weights, {wrong[0]} among them."
        )
    return stored
