"""Which parts of a model an adapter can go on, and which of them a config means."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lory.lora.layer import LoRALayer
from lory.lora.linear import is_quantized
from lory.lora.parameter import parameter_layers
from lory.runtime import UsageError

ALL_LINEAR = "all-linear"
V = TypeVar("V")
Part = Literal["language", "vision", "projector"]
_PROJECTOR = re.compile(r"(^|[._])(projector|connector|merger|aligner|projection_layer)([._]|$)")
Kind = Literal["linear", "conv1d", "embedding", "convolution", "parameter", "experts"]

# Their mixers use these layers' weights without calling them, so an adapter on one would do nothing
_BYPASSED = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d"))


@dataclass(frozen=True)
class Target:
    """Something an adapter can go on: a layer, or a bare Parameter of the module at `owner`.

    Kinds: linear; conv1d (transformers' linear layer whose weight is (in, out)); embedding; convolution; parameter (a
    2-D weight of a module of another kind, such as a router) and experts (a 3-D one).
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    owner: str = ""
    transposed: bool = False


def list_targets(model: nn.Module) -> dict[str, Target]:
    """Everything an adapter can go on, by path, in the model's order; what carries one already is not listed."""
    targets: dict[str, Target] = {}
    bypassed = _list_bypassed(model)
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind:
            if path not in bypassed and not isinstance(module, LoRALayer):
                # a 4-bit weight is a column of bytes
                quantized = is_quantized(module)
                shape = (module.out_features, module.in_features) if quantized else tuple(module.weight.shape)
                targets[path] = Target(path, kind, shape)
        elif path and not isinstance(module, (LoRALayer, nn.Embedding, _ConvNd)):
            targets |= _list_parameters(path, module)
    return targets


def _list_parameters(path: str, module: nn.Module) -> dict[str, Target]:
    transposed = bool(getattr(module, "is_transposed", False))
    adapted = {name for name, _ in parameter_layers(module)}
    targets = {}
    for name, parameter in module.named_parameters(recurse=False):
        own = f"{path}.{name}"
        if name in adapted or not parameter.is_floating_point():
            continue
        if parameter.dim() == 3 and parameter.shape[0] > 1:
            targets[own] = Target(own, parameter_kind(parameter), tuple(parameter.shape), path, transposed)
        elif parameter.dim() == 2 and name == "weight":
            targets[own] = Target(own, parameter_kind(parameter), tuple(parameter.shape), path)
    return targets


def parameter_kind(parameter: nn.Parameter) -> Kind:
    """What a bare parameter is to an adapter."""
    return "experts" if parameter.dim() == 3 else "parameter"


def kind_of(module: nn.Module) -> Kind | None:
    """How an adapter goes on this layer; None where it can't, since the layer is no plain product with its weight."""
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if isinstance(module, nn.Linear):
        # Falcon's own class is a plain linear layer; others of the kind, such as routers, are not
        plain = forward is nn.Linear.forward or type(module).__name__ == "FalconLinear" or is_quantized(module)
        return "linear" if plain or isinstance(module, LoRALayer) else None
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        plain = forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain or isinstance(module, LoRALayer) else None
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return "convolution" if module.groups == 1 else None
    return None


def _list_bypassed(model: nn.Module) -> set[str]:
    """Layers whose weights are used without calling them."""
    names = _BYPASSED.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    found = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found |= {f"{path}.{child}" for child, _ in module.named_modules() if child}
    return found


def find_head(model: nn.Module) -> nn.Module | None:
    """The output head of a transformers model."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def match_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers: str | Sequence[int] | None = None,
    frozen: Sequence[Part] = (),
) -> list[Target]:
    """What `targets`, `exclude` and `layers` mean (see `AdapterConfig`), in the model's order.

    Args:
        frozen: parts of a model that sees into which all-linear does not lead, nor a name that is there elsewhere, too;
            a name that is only there, and an expression, mean what they say.

    Raises:
        UsageError: nothing matches, a name of a list matches nothing, or an expression is broken.
    """
    known = list_targets(model)
    part_of = find_parts(model)
    open_paths = {path for path in known if part_of(path) not in frozen}
    if targets == ALL_LINEAR:
        head = find_head(model)
        linear = [target for target in known.values() if target.path in open_paths and _is_linear(target)]
        matched = [target for target in linear if model.get_submodule(target.owner or target.path) is not head]
    else:
        chosen = _select(model, known, targets, "adapter.targets", first=open_paths)
        matched = [target for target in known.values() if target.path in chosen]
    if exclude:
        excluded = _select(model, known, exclude, "adapter.exclude", inner=True)
        matched = [target for target in matched if target.path not in excluded]
    if layers is not None:
        wanted = parse_layers(layers)
        there = {number for path in known if (number := layer_number(path)) is not None}
        if missing := sorted(wanted - there):
            last = f"the last one is {max(there)}" if there else "its layers have no numbers"
            raise UsageError(f"adapter.layers names layer {missing[0]}, which this model does not have: {last}.")
        matched = [target for target in matched if layer_number(target.path) in wanted]
    if not matched:
        raise _nothing_matched(model, targets, known, "adapter.targets")
    return matched


def _is_linear(target: Target) -> bool:
    # a 3-D parameter elsewhere may be anything, so only what is called experts counts as their linear layers
    return target.kind in ("linear", "conv1d") or (target.kind == "experts" and "expert" in target.path)


def _select(
    model: nn.Module,
    known: Mapping[str, Target],
    wanted: str | Sequence[str],
    field: str,
    inner: bool = False,
    first: Collection[str] = (),
) -> set[str]:
    """Paths that a list of names or an expression means.

    Args:
        inner: a name stands for all that is in the module, too.
        first: a name means what it means among these paths, if anything.
    """
    if isinstance(wanted, str) and _is_expression(wanted):
        matches = _compile(wanted, field)
        return {path for path in known if matches(path)}
    names = [wanted] if isinstance(wanted, str) else wanted
    found: set[str] = set()
    for name in names:
        paths = {path for path in known if ends_with(path, name) or (inner and f".{name}." in f".{path}")}
        if not paths:
            raise _nothing_matched(model, name, known, field)
        found |= paths.intersection(first) or paths
    return found


def _is_expression(wanted: str) -> bool:
    return bool(re.search(r"[^\w.]", wanted))


def find_parts(model: nn.Module) -> Callable[[str], Part]:
    """A function that tells which part of the model a path leads into.

    A tower's output goes through the projector (which some models call merger or connector) into the language model.
    """
    if getattr(getattr(model, "config", None), "vision_config", None) is None:
        return lambda path: "language"
    modules = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
    inside = [path for path, module in model.named_modules() if any(module is one for one in modules)]
    language = tuple(f"{path}." for path in inside)

    def part_of(path: str) -> Part:
        if f"{path}.".startswith(language):
            return "language"
        return "projector" if _PROJECTOR.search(path) else "vision"

    return part_of


def _compile(expression: str, field: str) -> Callable[[str], object]:
    try:
        return re.compile(expression).fullmatch
    except re.error as error:
        raise UsageError(f"{field} is '{expression}', a broken regular expression: {error}.") from error


def ends_with(path: str, name: str) -> bool:
    """Whether the path's last components are `name`'s."""
    return path == name or path.endswith("." + name)


def look_up(pattern: Mapping[str, V] | None, path: str, default: V) -> V:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that, as an expression, ends the path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def layer_number(path: str) -> int | None:
    """The layer that a path is in: its first component that is a number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def parse_layers(layers: str | Sequence[int]) -> set[int]:
    """The numbers meant by "4-11", "0-3, 8" or [0, 3, 5].

    Raises:
        UsageError: it is none of these.
    """
    if not isinstance(layers, str):
        return set(layers)
    numbers: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(
                f"adapter.layers is '{layers}'; a range such as 4-11, several of them (0-3,8), or a list is expected."
            )
        numbers |= set(range(first, last + 1))
    return numbers


def _nothing_matched(
    model: nn.Module, target: str | Sequence[str], known: Mapping[str, Target], field: str
) -> UsageError:
    counts = Counter(path.rpartition(".")[2] for path in known)
    hint = ""
    if isinstance(target, str):
        if any(ends_with(path, target) for path, _ in model.named_modules() if path not in known):
            return UsageError(f"{field} names '{target}', which is no layer that an adapter can go on.")
        near = difflib.get_close_matches(target, counts, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
    there = ", ".join(f"{name} ({count})" for name, count in counts.most_common()) or "none"
    return UsageError(f"{field} names '{target}', which no layer matches.{hint} There are: {there}.")


def match_modules(model: nn.Module, names: Iterable[str], field: str) -> list[str]:
    """Paths of the modules that end with one of these names; a name without one is a `UsageError`."""
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for name in names:
        matched = [path for path in paths if ends_with(path, name)]
        if not matched:
            near = difflib.get_close_matches(name, {path.rpartition(".")[2] for path in paths}, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"{field} names '{name}', which this model does not have.{hint}")
        found += [path for path in matched if path not in found]
    return found
