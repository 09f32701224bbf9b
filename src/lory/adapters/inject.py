"""Putting an adapter on a model: what matches is turned, in place, into its LoRA class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import nn

import lory.lora as lora
from lory.adapters.targets import (
    ALL_LINEAR,
    Part,
    Target,
    look_up,
    match_modules,
    match_targets,
    parse_layers,
)
from lory.config import Section
from lory.lora.layer import LoRALayer
from lory.lora.parameter import ParameterLoRA, parameter_layers
from lory.runtime import UsageError

__all__ = ["ALL_LINEAR", "AdapterConfig", "Match", "adapted_layers", "attach_lora", "match_targets"]


class Freezing(Protocol):
    """The part of a config that speaks of models that see."""

    @property
    def freeze_vision(self) -> bool: ...
    @property
    def freeze_projector(self) -> bool: ...


class AdapterConfig(Section):
    """What is trained on top of the frozen model."""

    type: Literal["lora", "dora"] = Field(
        "lora",
        description="The kind of adapter: lora, or dora, which also learns the length of each output's row of weights.",
    )
    rank: int = Field(16, ge=1, description="Rank R of the update B A.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / rank.")
    rslora: bool = Field(
        False, description="Scale the update by alpha / sqrt(rank) instead, which suits high ranks (rsLoRA)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of zeroing an adapter input during training.")
    targets: str | list[str] = Field(
        ALL_LINEAR,
        description="What gets an adapter: all-linear (all linear layers, those held as stacked experts included, but "
        "the output head), names, or a regular expression that matches whole module paths.",
    )
    exclude: str | list[str] = Field(
        default_factory=list,
        description="What of the targets gets none: names, also of modules that contain them, or a regular expression.",
    )
    layers: str | list[int] | None = Field(
        None, description='Only targets in these layers, counted from 0: "4-11", "0-3,8" or [0, 3, 5].'
    )
    freeze_vision: bool = Field(
        True,
        description="Of a model that sees: leave its vision tower as it is, but for what is named and is only there; "
        "false: all-linear and names mean its layers, too.",
    )
    freeze_projector: bool = Field(True, description="The same for what lies between its tower and its language model.")
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Other ranks for some targets: the first key (a regular expression) that ends their path counts.",
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Other alphas for some targets, found as in rank_pattern."
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Names of modules that are trained in full and stored with the adapter, such as a new head.",
    )
    init: Literal["default", "pissa"] = Field(
        "default",
        description="How A and B start: default (B is zero), or pissa, the principal part of the weight; stored as a "
        "plain LoRA of twice the rank that fits the original model.",
    )
    lora_plus_ratio: float | None = Field(
        None, gt=0, description="Learning rate of B over that of A (LoRA+); 16 is usual, null is the same for both."
    )

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.layers is not None:
            parse_layers(self.layers)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"'{key}' is a broken regular expression: {error}") from error
        if low := [key for key, rank in self.rank_pattern.items() if rank < 1]:
            raise ValueError(f"rank_pattern has {self.rank_pattern[low[0]]} for '{low[0]}'; a rank is 1 or more")
        if low := [key for key, alpha in self.alpha_pattern.items() if not alpha > 0]:
            raise ValueError(f"alpha_pattern has {self.alpha_pattern[low[0]]} for '{low[0]}'; alpha is positive")
        return self


@dataclass(frozen=True)
class Match:
    """One adapted layer, or a module that is trained in full (rank 0), for the table that is shown and stored."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


@dataclass(frozen=True)
class Settings:
    """How one target is adapted."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    pissa: bool = False


@dataclass
class Trained:
    """What of a model is stored as a whole beside its adapters; kept on the model as `lory_trained`."""

    modules: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    bias: str = "none"


def frozen_parts(config: Freezing) -> list[Part]:
    """The parts of a model that sees which a config leaves as they are."""
    given: list[tuple[Part, bool]] = [("vision", config.freeze_vision), ("projector", config.freeze_projector)]
    return [part for part, frozen in given if frozen]


def attach_lora(model: nn.Module, config: AdapterConfig) -> list[Match]:
    """Freeze `model` and put an adapter on its matching layers, in place; returns what was matched.

    Raises:
        UsageError: nothing matches, or a target cannot be adapted as asked.
    """
    whole = match_modules(model, config.modules_to_save, "adapter.modules_to_save")
    targets = [
        target
        for target in match_targets(model, config.targets, config.exclude, config.layers, frozen_parts(config))
        if not any(f"{target.path}.".startswith(f"{path}.") for path in whole)
    ]
    if not targets:
        raise UsageError("adapter.modules_to_save contains all of the targets; leave something that gets an adapter.")
    for pattern in (config.rank_pattern, config.alpha_pattern):
        if unused := [key for key in pattern if not any(look_up({key: True}, t.path, False) for t in targets)]:
            raise UsageError(
                f"adapter.rank_pattern or alpha_pattern has '{unused[0]}', which none of the targets matches."
            )
    model.requires_grad_(False)
    keep_scale(model)
    matches = []
    for target in targets:
        layer = adapt(model, target, _settings(config, target.path))
        learnt = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad)
        matches.append(Match(target.path, target.kind, target.shape, layer.r, learnt))
    train_modules(model, whole)
    for path in whole:
        module = model.get_submodule(path)
        size = sum(parameter.numel() for parameter in module.parameters())
        matches.append(Match(path, type(module).__name__, (), 0, size))
    return matches


def keep_scale(model: nn.Module) -> None:
    """Stop RWKV from dividing the weights of its later layers in eval mode: an adapter's part would stay undivided.

    The division and its counterpart in the forward are there against overflow in fp16, and cancel out (but for what the
    norms add against division by zero).
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            mode = module.training
            module.training = True
            module._rescale_layers()  # back to what was loaded, where a forward has been before
            module.training = mode
            module.config.rescale_every = 0


def _settings(config: AdapterConfig, path: str) -> Settings:
    return Settings(
        look_up(config.rank_pattern, path, config.rank),
        look_up(config.alpha_pattern, path, config.alpha),
        config.dropout,
        config.rslora,
        config.type == "dora",
        config.init == "pissa",
    )


def adapt(model: nn.Module, target: Target, how: Settings) -> LoRALayer:
    """Turn one target into its LoRA class, which shares its weight.

    Raises:
        UsageError: this kind of target cannot have what `how` asks for.
    """
    _check_kind(target, how)
    if target.owner:
        owner = model.get_submodule(target.owner)
        name = target.path.rpartition(".")[2]
        return lora.adapt_parameter(owner, name, how.rank, how.alpha, how.rslora, target.transposed)
    base = model.get_submodule(target.path)
    layer = _build_layer(base, target, how)
    if how.dora:
        layer.add_magnitude()
    if how.pissa and isinstance(layer, lora.Linear):
        layer.start_principal()
    parent, _, name = target.path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
    return layer


def _build_layer(base: nn.Module, target: Target, how: Settings) -> LoRALayer:
    if target.kind == "embedding":
        return lora.Embedding.from_base(base, how.rank, how.alpha, rslora=how.rslora)
    if target.kind == "convolution":
        return lora.adapt_convolution(base, how.rank, how.alpha, how.dropout, rslora=how.rslora)
    if lora.is_quantized(base):
        layer: LoRALayer = lora.adapt_quantized(base, how.rank, how.alpha, how.dropout, rslora=how.rslora)
        return layer
    transposed = target.kind == "conv1d"
    return lora.Linear.from_base(base, how.rank, how.alpha, how.dropout, fan_in_fan_out=transposed, rslora=how.rslora)


def _check_kind(target: Target, how: Settings) -> None:
    problem = ""
    if target.owner and how.dropout:
        problem = "is a bare parameter, which adapter.dropout does not work on; set it to 0"
    elif target.owner and how.dora:
        problem = "is a bare parameter, which adapter.type dora does not work on; use lora"
    elif how.pissa and target.kind not in ("linear", "conv1d"):
        problem = "is no linear layer, which adapter.init pissa needs; use default"
    if problem:
        raise UsageError(f"'{target.path}' {problem}, or name it in adapter.exclude.")


def train_modules(model: nn.Module, paths: Iterable[str]) -> None:
    """Train these modules in full and store them with the adapter; weights they share with others become their own."""
    trained = whole_tensors(model)
    for path in paths:
        module = model.get_submodule(path)
        if any(lora.is_quantized(part) for part in module.modules()):
            raise UsageError(f"'{path}' is quantized, so it cannot be trained in full; set model.quantize to null.")
        for name in module.state_dict():
            if f"{path}.{name}" not in trained.tensors:
                trained.tensors.append(f"{path}.{name}")
        for name, parameter in list(module.named_parameters()):
            set_parameter(model, f"{path}.{name}", parameter.detach().clone(), trainable=True)
        trained.modules.append(path)


def set_parameter(model: nn.Module, path: str, value: torch.Tensor, trainable: bool) -> None:
    """Put a new Parameter at `path`; modules that shared the old one keep it."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Parameter(value, requires_grad=trainable))


def whole_tensors(model: nn.Module) -> Trained:
    """The record of what is stored as a whole; changes to it stay with the model."""
    if "lory_trained" not in model.__dict__:
        model.__dict__["lory_trained"] = Trained()
    trained: Trained = model.__dict__["lory_trained"]
    return trained


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and layer of everything that carries an adapter; a bare parameter's path is its own."""
    for path, module in model.named_modules():
        for name, layer in parameter_layers(module):
            yield f"{path}.{name}", layer
        if isinstance(module, LoRALayer) and not isinstance(module, ParameterLoRA) and module.has_adapter:
            yield path, module
