"""loralib's state dicts to PEFT's folders and back; what cannot be said in the other format is refused by name."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from lory.adapters.checkpoints import Weights
from lory.adapters.factors import Adapter, Factors, is_saved, read_adapter, scale, write_adapter
from lory.runtime import UsageError, explain_os_error, write_aside

T = TypeVar("T")

EMBEDDINGS = r"wte|wpe|embed_tokens|tok_embeddings|\w*embeddings?"
"""Layers that are taken for embeddings: by their shapes, loralib's Embedding and Linear are the same."""


@dataclass(frozen=True)
class Slices:
    """How a `lora.MergedLinear` cuts its outputs: which slices are adapted, and their sizes where these are unequal."""

    enabled: tuple[bool, ...]
    sizes: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Slices:
        """``1,0,1``: three equal slices, the second without an adapter; ``64:1,16:0,16:1`` gives their sizes."""
        parts = [part.strip().rpartition(":") for part in text.split(",")]
        sized = [bool(colon) for _, colon, _ in parts]
        wrong = any(flag not in ("0", "1") or (colon and not size.isdigit()) for size, colon, flag in parts)
        if wrong or len(set(sized)) > 1 or not any(flag == "1" for *_, flag in parts):
            raise UsageError(f"Slices '{text}' were given; 1,0,1 or, for unequal ones, 64:1,16:0,16:1 is expected.")
        sizes = tuple(int(size) for size, *_ in parts) if sized[0] else None
        return cls(tuple(flag == "1" for *_, flag in parts), sizes)

    def resolve(self, adapted_rows: int, module: str) -> list[int]:
        """Outputs of each slice, given how many rows the adapted ones have together."""
        count = sum(self.enabled)
        sizes = self.sizes or (adapted_rows // count,) * len(self.enabled)
        if sum(size for size, on in zip(sizes, self.enabled, strict=True) if on) != adapted_rows:
            raise UsageError(
                f"'{module}' has {adapted_rows} adapted outputs, which don't make up its {count} adapted slices; "
                "give their sizes, as in --merged NAME=64:1,16:0,16:1."
            )
        return list(sizes)


@dataclass(frozen=True)
class Layout:
    """What a loralib file does not say about its layers; each key is a regular expression that ends a module's path."""

    merged: Mapping[str, Slices] = field(default_factory=dict)
    """`lora.MergedLinear` layers."""
    convolutions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolutions and their kernel sizes; groups are not supported."""
    embeddings: str = EMBEDDINGS

    def check(self, modules: Sequence[str]) -> None:
        """Refuse a key that matches no layer, or a layer that two keys match."""
        for pattern in [*self.merged, *self.convolutions]:
            if not any(_ends(module, pattern) for module in modules):
                raise UsageError(f"'{pattern}' matches none of the adapted layers, such as {', '.join(modules[:3])}.")


def _ends(module: str, pattern: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise UsageError(f"'{pattern}' is a broken regular expression: {error}.") from error


def _look_up(table: Mapping[str, T], module: str) -> T | None:
    return next((value for pattern, value in table.items() if _ends(module, pattern)), None)


def parse_kernel(text: str) -> tuple[int, ...]:
    """``3x3`` as (3, 3)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        raise UsageError(f"Kernel '{text}' was given; 3, 3x3 or 3x3x3 is expected.")
    return tuple(int(size) for size in text.split("x"))


def holds_loralib(weights: Weights) -> bool:
    """Whether these are the names of a loralib state dict."""
    return any(name.endswith((".lora_A", ".lora_B")) for name in weights.tensors)


def loralib_to_peft(
    weights: Weights,
    out: Path,
    alpha: float,
    layout: Layout,
    base: str | None = None,
    fan_in_fan_out: bool = False,
    modules_to_save: Sequence[str] = (),
) -> Adapter:
    """Write what ``lora_state_dict(model)`` gave as an adapter folder in PEFT's format; the shapes tell the ranks.

    A MergedLinear of rank r with n adapted slices becomes one adapter of rank r * n with a block-diagonal B, and a
    convolution of rank r one of rank r * k * k: the same changes, in more factors.

    Args:
        alpha: the layers' lora_alpha, which loralib's files do not hold.
        base: what base_model_name_or_path shall say.
        fan_in_fan_out: the model's linear layers store (in, out), as GPT-2's do.
        modules_to_save: modules whose parameters in the file are stored whole, such as a classifier.

    Raises:
        UsageError: a tensor is neither an adapter's nor a bias nor of these modules, or its layer is not known.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(
            f"alpha {alpha} was given; the positive lora_alpha that the layers were built with is expected."
        )
    tensors = weights.tensors
    modules = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    layout.check(modules)
    layers, parameters = {}, {}
    for module in modules:
        lora_A, lora_B = tensors[f"{module}.lora_A"], tensors.get(f"{module}.lora_B")
        if lora_B is None or lora_A.ndim != 2 or lora_B.ndim != 2:
            raise UsageError(f"{weights.where} has no two-dimensional lora_A and lora_B for '{module}'.")
        layers[module] = _to_peft(module, lora_A, lora_B, alpha, layout)
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if parameter in ("lora_A", "lora_B") and module in layers:
            continue
        if module.removesuffix(".conv") in layers:  # where loralib's convolutions have their own parameters
            name = f"{module.removesuffix('.conv')}.{parameter}"
        if parameter != "bias" and not is_saved(name, tuple(modules_to_save)):
            raise UsageError(
                f"{weights.where} holds '{name}', which is no adapter's; leave it out with --ignore, or, where it is "
                "of a module that was trained whole, name that module with --save-module."
            )
        parameters[name] = tensor
    for module in modules_to_save:
        if not any(is_saved(name, (module,)) for name in parameters):
            raise UsageError(f"--save-module {module} was given, but {weights.where} holds no parameter of it.")
    adapter = Adapter(layers, parameters, tuple(modules_to_save), base, fan_in_fan_out)
    with write_aside(out) as aside:
        write_adapter(aside, adapter)
    return adapter


def _to_peft(module: str, lora_A: Tensor, lora_B: Tensor, alpha: float, layout: Layout) -> Factors:
    if slices := _look_up(layout.merged, module):
        return _merged_to_peft(module, lora_A, lora_B, alpha, slices)
    if lora_A.shape[0] != lora_B.shape[1]:
        count = lora_A.shape[0] / lora_B.shape[1]
        shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
        if not count.is_integer():
            raise UsageError(f"'{module}' has {shapes}, which are of no layer of loralib's.")
        raise UsageError(
            f"'{module}' has {shapes}, as a MergedLinear with {count:.0f} adapted slices has; say which of its slices "
            f"these are, as in --merged '{module.rpartition('.')[2]}=1,0,1'."
        )
    if kernel := _look_up(layout.convolutions, module):
        return _conv_to_peft(module, lora_A, lora_B, alpha, kernel)
    return Factors(lora_A, lora_B, alpha, is_embedding=_ends(module, layout.embeddings))


def _merged_to_peft(module: str, lora_A: Tensor, lora_B: Tensor, alpha: float, slices: Slices) -> Factors:
    """A as it is, and B (out, n * r) with each adapted slice's rows in columns of their own."""
    count, r = sum(slices.enabled), lora_B.shape[1]
    if lora_A.shape[0] != count * r:
        raise UsageError(
            f"'{module}' has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, which are not of "
            f"{count} adapted slices."
        )
    sizes = slices.resolve(lora_B.shape[0], module)
    blocks = lora_B.split([size for size, on in zip(sizes, slices.enabled, strict=True) if on])
    wide = lora_B.new_zeros(sum(sizes), count * r)
    wide[_adapted_rows(slices, sizes)] = torch.block_diag(*blocks)
    # alpha / r and (n alpha) / (n r) are the same scaling
    return Factors(lora_A, wide, alpha * count)


def _adapted_rows(slices: Slices, sizes: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(slices.enabled), torch.tensor(sizes))


def _conv_to_peft(module: str, lora_A: Tensor, lora_B: Tensor, alpha: float, kernel: tuple[int, ...]) -> Factors:
    """PEFT's A (R, in, *kernel) and B (out, R, 1, ...) for loralib's (r m, in q) and (out p, r m).

    q is the kernel's last size, p the product of the others and m the smaller of the two. Row o of the weight, read as
    (out, in p q), is the p rows ``o p + a`` of B A one after the other: the sum over a of row ``o p + a`` of B times A
    at place a. So R is p times r m.
    """
    *others, q = kernel
    p = math.prod(others)
    rank, (rows, columns) = lora_A.shape[0], (lora_B.shape[0], lora_A.shape[1])
    if rank % min(p, q) or rows % p or columns % q:
        raise UsageError(
            f"'{module}' has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, which are not of a "
            f"convolution with kernel {kernel}."
        )
    wide_A = torch.block_diag(*[lora_A] * p).view(p * rank, columns // q, *kernel)
    wide_B = lora_B.reshape(rows // p, p * rank, *[1] * len(kernel))
    # r m = rank, so alpha / r is (alpha m p) / (p rank)
    return Factors(wide_A, wide_B, alpha * min(p, q) * p)


def peft_to_loralib(
    folder: Path,
    out: Path,
    layout: Layout,
    alpha: float | None = None,
    rename: Sequence[tuple[re.Pattern[str], str]] = (),
) -> tuple[dict[str, Tensor], float]:
    """Write an adapter folder as a state dict for a model of loralib's layers (`load_state_dict`, ``strict=False``).

    Args:
        out: a .pt or .safetensors file to write; it must not exist.
        layout: the layers that are `lora.MergedLinear`; all other linear ones are `lora.Linear`.
        alpha: the lora_alpha that the layers are built with; by default the adapter's most frequent one. Where a
            layer's own scaling differs, the difference goes into B.
        rename: substitutions in the state dict's names (see `Weights.rename`).

    Returns:
        The state dict, and the alpha that the layers must be built with; the rank of each is lora_A's, divided by a
        MergedLinear's adapted slices or by the smaller side of a convolution's kernel.

    Raises:
        UsageError: a MergedLinear's B is not block-diagonal, or `out` exists.
    """
    if out.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"{out} was given; a .pt or .safetensors file is expected for loralib.")
    if out.exists():
        raise UsageError(f"{out} exists already; choose another name, or delete it first.")
    read = read_adapter(folder)
    layout.check(list(read.layers))
    split = {name: _to_loralib(name, layer, layout) for name, layer in read.layers.items()}
    # loralib scales by alpha / r, the adapter by alpha / rank
    alphas = {name: read.layers[name].alpha * r / read.layers[name].rank for name, (_, _, r) in split.items()}
    if alpha is None:
        alpha = Counter(alphas.values()).most_common(1)[0][0]
    check_alpha(alpha)
    state: dict[str, Tensor] = {}
    for name, (lora_A, lora_B, _) in split.items():
        state[f"{name}.lora_A"], state[f"{name}.lora_B"] = lora_A, scale(lora_B, alphas[name] / alpha)
    for name, tensor in read.parameters.items():
        module, _, parameter = name.rpartition(".")
        inner = module in read.layers and read.layers[module].lora_A.ndim > 2
        state[f"{module}.conv.{parameter}" if inner else name] = tensor
    state = Weights(state, (), folder).rename(rename).tensors
    _save(state, out)
    return state, alpha


def check_alpha(alpha: float) -> None:
    """Refuse an alpha that no layer can have."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"alpha is {alpha}; the positive lora_alpha that the layers were built with is expected.")


def _to_loralib(module: str, layer: Factors, layout: Layout) -> tuple[Tensor, Tensor, int]:
    """lora_A, lora_B and loralib's r."""
    if slices := _look_up(layout.merged, module):
        return *_peft_to_merged(module, layer, slices), layer.rank // sum(slices.enabled)
    if layer.lora_A.ndim > 2:
        return _peft_to_conv(layer)
    return layer.lora_A, layer.lora_B, layer.rank


def _peft_to_merged(module: str, layer: Factors, slices: Slices) -> tuple[Tensor, Tensor]:
    count, out = sum(slices.enabled), layer.lora_B.shape[0]
    if slices.sizes is None and out % len(slices.enabled):
        raise UsageError(f"'{module}' has {out} outputs, which don't divide into {len(slices.enabled)} equal slices.")
    sizes = list(slices.sizes or (out // len(slices.enabled),) * len(slices.enabled))
    if sum(sizes) != out or layer.rank % count:
        raise UsageError(
            f"'{module}' has {out} outputs and rank {layer.rank}, which don't fit slices of {sizes}, {count} of them "
            "adapted."
        )
    rows, r = _adapted_rows(slices, sizes), layer.rank // count
    blocks = layer.lora_B[rows].split([size for size, on in zip(sizes, slices.enabled, strict=True) if on])
    packed = torch.cat([block[:, i * r : (i + 1) * r] for i, block in enumerate(blocks)])
    again = torch.block_diag(*packed.split([len(block) for block in blocks]))
    if layer.lora_B[~rows].any() or not torch.equal(again, layer.lora_B[rows]):
        raise UsageError(
            f"'{module}' has a B that is not block-diagonal, so no MergedLinear has the same change; use a lora.Linear "
            "for it, without --merged."
        )
    return layer.lora_A, packed


def _peft_to_conv(layer: Factors) -> tuple[Tensor, Tensor, int]:
    """The other way of `_conv_to_peft`; r is rounded up with rows of zeros where the kernel is higher than wide."""
    channels, *kernel = layer.lora_A.shape[1:]
    *others, q = kernel
    p = math.prod(others)
    r = -(-layer.rank * p // min(p, q))
    # (R, in p q) and (out, R) to (p R, in q) and (out p, p R): the a-th p-th of A's columns belongs to row o p + a
    flat = layer.lora_A.reshape(layer.rank, p, channels * q)
    lora_A = flat.transpose(0, 1).reshape(p * layer.rank, channels * q)
    lora_B = torch.kron(layer.lora_B.flatten(1), torch.eye(p, dtype=layer.lora_B.dtype))
    # kron orders columns as (j, a); A's rows are ordered (a, j)
    lora_B = lora_B.view(-1, layer.rank, p).transpose(1, 2).flatten(1)
    missing = r * min(p, q) - p * layer.rank
    pad = torch.nn.functional.pad
    return pad(lora_A, [0, 0, 0, missing]), pad(lora_B, [0, missing]), r


def _save(state: Mapping[str, Tensor], out: Path) -> None:
    own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    aside = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".safetensors":
            save_file(own, aside, {"format": "pt"})
        else:
            torch.save(own, aside)
        os.replace(aside, out)
    except OSError as error:
        raise explain_os_error(error, f"write {out}") from error
    finally:
        aside.unlink(missing_ok=True)
