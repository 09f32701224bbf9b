"""Putting an adapter on a model: layers that match are replaced, in place, by their LoRA class."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import nn

import lory.lora as lora
from lory.config import Section
from lory.runtime import UsageError

ALL_LINEAR = "all-linear"


class AdapterConfig(Section):
    """What is trained on top of the frozen model."""

    type: Literal["lora"] = Field("lora", description="The kind of adapter: lora.")
    rank: int = Field(16, ge=1, description="Rank R of the update B A.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of zeroing an adapter input during training.")
    targets: str | list[str] = Field(
        ALL_LINEAR,
        description="Layers that get an adapter: all-linear (all but the output head), names, or a regular expression "
        "that matches whole module paths.",
    )


@dataclass(frozen=True)
class Match:
    """One adapted layer, for the table that is shown and stored."""

    name: str
    in_features: int
    out_features: int
    parameters: int


def list_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All plain linear layers by module path, those of the output head included."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def match_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """The paths of the linear layers that `targets` means (see `AdapterConfig.targets`), in the model's order.

    Raises:
        UsageError: nothing matches, a name of the list matches nothing, or the expression is broken.
    """
    linears = list_linears(model)
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        matched = [name for name, module in linears.items() if module is not head]
    elif isinstance(targets, str) and re.search(r"[^\w.]", targets):
        matched = _match_expression(targets, linears)
    else:
        names = [targets] if isinstance(targets, str) else targets
        matched = [path for path in linears if any(_ends_with(path, name) for name in names)]
        for name in names:
            if not any(_ends_with(path, name) for path in linears):
                raise _nothing_matched(model, name, linears)
    if not matched:
        raise _nothing_matched(model, targets, linears)
    return matched


def _match_expression(expression: str, linears: dict[str, nn.Linear]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UsageError(f"adapter.targets is '{expression}', a broken regular expression: {error}.") from error
    return [name for name in linears if pattern.fullmatch(name)]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _nothing_matched(model: nn.Module, target: str | list[str], linears: dict[str, nn.Linear]) -> UsageError:
    counts = Counter(name.rpartition(".")[2] for name in linears)
    if isinstance(target, str):
        known = [*linears, *counts, *(name for name, module in model.named_modules() if type(module) is not nn.Linear)]
        if target in known or any(_ends_with(name, target) for name in known):
            return UsageError(f"adapter.targets names '{target}', which is not a linear layer of this model.")
        near = difflib.get_close_matches(target, counts, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
    else:
        hint = ""
    there = ", ".join(f"{name} ({count})" for name, count in counts.most_common()) or "none"
    return UsageError(f"adapter.targets names '{target}', which no linear layer matches.{hint} There are: {there}.")


def attach_lora(model: nn.Module, config: AdapterConfig) -> list[Match]:
    """Freeze `model` and put a LoRA adapter on its matching layers, in place; returns what was matched."""
    names = match_targets(model, config.targets)
    model.requires_grad_(False)
    matches = []
    for name in names:
        layer = replace_linear(model, name, config.rank, config.alpha, config.dropout)
        parameters = layer.lora_A.numel() + layer.lora_B.numel()
        matches.append(Match(name, layer.in_features, layer.out_features, parameters))
    return matches


def replace_linear(model: nn.Module, name: str, rank: int, alpha: float, dropout: float = 0.0) -> lora.Linear:
    """Turn the linear layer at path `name` into a `lora.Linear` that shares its weight."""
    parent = model.get_submodule(name.rpartition(".")[0])
    base = model.get_submodule(name)
    if not isinstance(base, nn.Linear):
        raise UsageError(f"The adapter wants '{name}' to be a linear layer, but it is a {type(base).__name__}.")
    if isinstance(base, lora.Linear):
        raise UsageError(f"'{name}' carries an adapter already; load the base model afresh to attach another.")
    layer = lora.Linear.from_base(base, rank, alpha, dropout)
    setattr(parent, name.rpartition(".")[2], layer)
    return layer


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, lora.Linear]]:
    """Path and layer of everything that carries an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, lora.Linear) and module.r:
            yield name, module
