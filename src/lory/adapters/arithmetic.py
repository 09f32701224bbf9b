"""Adapter arithmetic: the weighted sum of several adapters as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lory.adapters.factors import Adapter, Factors, read_adapter, scale, write_adapter
from lory.runtime import UsageError, log, write_aside

Mode = Literal["cat", "linear"]


def combine(adapters: Sequence[tuple[Path, float]], out: Path, mode: Mode = "cat", even: bool = False) -> Adapter:
    """Write one adapter whose change of each layer is the sum of the given ones', each times its weight.

    Args:
        adapters: folders in PEFT's format and their weights; ranks, alphas and layers may differ.
        out: the folder to write; it must not exist.
        mode: PEFT's combination_type. ``cat`` puts the factors side by side: exact, and the ranks add up. ``linear``
            adds up the A and the B, each times the root of its weight and scaling: keeps the rank, but is only an
            approximation, and wants equal ranks.
        even: pad all layers with zeros to the same rank and give them the same alpha, for programs that know no
            rank_pattern, alpha_pattern or rsLoRA. One adapter alone may be given for that.

    Raises:
        UsageError: the adapters don't fit together, or hold what cannot be added; nothing has been written.
    """
    if not adapters:
        raise UsageError("No adapter was given; one or more are expected.")
    if mode not in get_args(Mode):
        raise UsageError(f"mode='{mode}' was given; cat or linear is expected.")
    for folder, weight in adapters:
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(f"{folder} has weight {weight}; a number other than 0 is expected (0 would leave it out).")
    read = [(read_adapter(folder), weight) for folder, weight in adapters]
    _check_together(read, [folder for folder, _ in adapters])
    names = sorted({name for adapter, _ in read for name in adapter.layers})
    join = _join_exactly if mode == "cat" else _join_roughly
    layers = {
        name: join(name, [(adapter.layers[name], weight) for adapter, weight in read if name in adapter.layers])
        for name in names
    }
    if even:
        rank = max(layer.rank for layer in layers.values())
        layers = {name: _pad(layer, rank) for name, layer in layers.items()}
    first = read[0][0]
    parameters = {name: tensor for adapter, _ in read for name, tensor in adapter.parameters.items()}
    result = replace(first, layers=layers, parameters=parameters, dropout=0.0 if len(read) > 1 else first.dropout)
    with write_aside(out) as aside:
        write_adapter(aside, result)
    return result


def _check_together(read: Sequence[tuple[Adapter, float]], folders: Sequence[Path]) -> None:
    first, where = read[0][0], folders[0]
    for (other, _), folder in zip(read[1:], folders[1:], strict=True):
        if other.base != first.base:
            log.warning("%s was made for %s, and %s for %s; add only adapters of one base.",
                        where, first.base, folder, other.base)  # fmt: skip
        if other.fan_in_fan_out != first.fan_in_fan_out:
            raise UsageError(f"{where} and {folder} differ in fan_in_fan_out; they are not for the same model.")
        if other.parameters.keys() != first.parameters.keys() or other.modules_to_save != first.modules_to_save:
            name = next(iter(other.parameters.keys() ^ first.parameters.keys()), "modules_to_save")
            raise UsageError(f"Only one of {where} and {folder} brings '{name}', which cannot be added to a sum.")
        for name, tensor in first.parameters.items():
            if not torch.equal(tensor, other.parameters[name]):
                raise UsageError(f"{where} and {folder} bring different '{name}', a whole parameter, not a change.")
        for name in first.layers.keys() & other.layers.keys():
            if _shape(first.layers[name]) != _shape(other.layers[name]):
                raise UsageError(f"{where} and {folder} have different shapes for '{name}'; add adapters of one base.")


def _shape(layer: Factors) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
    """What two adapters of one layer share, whatever their ranks."""
    return layer.is_embedding, tuple(layer.lora_A.shape[1:]), (layer.lora_B.shape[0], *layer.lora_B.shape[2:])


def _join_exactly(name: str, parts: Sequence[tuple[Factors, float]]) -> Factors:
    """[A1; A2] and [w1 s1 B1, w2 s2 B2] with a scaling of 1."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    lora_A = _cat([layer.lora_A for layer, _ in parts], 0)
    lora_B = _cat([scale(layer.lora_B, weight * layer.scaling) for layer, weight in parts], 1)
    return replace(parts[0][0], lora_A=lora_A, lora_B=lora_B, alpha=float(lora_A.shape[0]))


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    wide = tensors[0].dtype
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return torch.cat([tensor.to(wide) for tensor in tensors], dim)


def _join_roughly(name: str, parts: Sequence[tuple[Factors, float]]) -> Factors:
    """PEFT's `linear`: the roots of weight * scaling on both sides, the sign on A's; a scaling of 1."""
    ranks = {layer.rank for layer, _ in parts}
    if len(ranks) > 1:
        raise UsageError(f"'{name}' has ranks {sorted(ranks)}; mode linear wants equal ones, so use mode cat.")
    factors = [weight * layer.scaling for layer, weight in parts]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    return replace(
        parts[0][0],
        lora_A=_add([scale(layer.lora_A, root) for (layer, _), root in zip(parts, signed, strict=True)]),
        lora_B=_add([scale(layer.lora_B, root) for (layer, _), root in zip(parts, roots, strict=True)]),
        alpha=float(ranks.pop()),
    )


def _add(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _pad(layer: Factors, rank: int) -> Factors:
    """The same change at a higher rank, with alpha equal to it."""
    missing = rank - layer.rank
    rows = [0] * (2 * (layer.lora_A.ndim - 1)) + [0, missing]
    columns = [0] * (2 * (layer.lora_B.ndim - 2)) + [0, missing, 0, 0]
    lora_B = scale(layer.lora_B, layer.scaling)
    return replace(layer, lora_A=F.pad(layer.lora_A, rows), lora_B=F.pad(lora_B, columns), alpha=float(rank))
