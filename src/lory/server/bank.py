"""Several adapters over one copy of the base: each row of a batch gets the change of its own adapter.

A layer's output y = W x is followed by ``y += s B A x`` of the row's adapter. The adapters in use have a place each in
tables of A and B, so that all rows go through two products: by all places' A at once, then, what belongs to another
row's adapter set to zero, by all places' B (Chen et al. 2023, "Punica", arXiv 2310.18547, has a kernel for it; with few
rows and small ranks, what is computed in vain costs less than a call for each adapter).

Shapes: M rows of a product, S places, P layers that share an input (such as q, k and v), R the largest rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lory.adapters.files import AdapterFiles, read_adapter_config
from lory.adapters.prompt import is_soft_prompt
from lory.adapters.targets import list_targets
from lory.runtime import LoryError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lory.models.lean import LeanDecoder, Product

_JOINED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter, read: by the path of the layer A (R, in) and s * B (out, R)."""

    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(len(a) for a, _ in self.factors.values())


def read_adapter(model: nn.Module, folder: Path) -> Adapter:
    """The adapter in a folder, for this model.

    Raises:
        UsageError: it is none, is broken, is of a kind that a batch can't mix, or was made for another model.
    """
    remedy = "merge it with `lory merge` and serve the result"
    if is_soft_prompt(folder):
        raise UsageError(f"{folder} is a soft prompt; several adapters can only be served if they are LoRA.")
    if read_adapter_config(folder).get("use_dora"):
        raise UsageError(f"{folder} is a DoRA adapter; several adapters can only be served if they are LoRA: {remedy}.")
    files = AdapterFiles(folder)
    if files.whole:
        raise UsageError(f"{folder} holds '{min(files.whole)}' as a whole, beside its LoRA: {remedy}.")
    files.name_parameters(model)
    targets = list_targets(model)
    factors = {}
    for path in files.modules:
        target = targets.get(path)
        if target is None:
            base = files.config.get("base_model_name_or_path") or "another model"
            raise UsageError(f"{folder} adapts '{path}', which this model does not have; it was made for {base}.")
        if target.kind not in ("linear", "conv1d"):
            raise UsageError(f"{folder} adapts '{path}', which is no linear layer: {remedy}.")
        lora_a, lora_b = files.factors(path)
        shape = target.shape if target.kind == "linear" else target.shape[::-1]
        if (len(lora_b), lora_a.shape[1]) != tuple(shape):
            raise UsageError(f"{folder} does not fit '{path}' of this model; it was made for another one.")
        factors[path] = (lora_a.float(), lora_b.float() * files.scaling(path))
    return Adapter(factors)


class _Product:
    """The tables of the layers that share an input: A (S, P, R, in), and for each layer B (S, R, out)."""

    def __init__(self, bank: AdapterBank, paths: Sequence[str], outs: Sequence[slice]) -> None:
        self.bank, self.paths, self.outs = bank, list(paths), list(outs)
        self.parts: list[tuple[int, str, slice]] = []
        self.a: Tensor | None = None
        self.b: list[Tensor] = []

    def allocate(self, places: int, rank: int, adapters: Sequence[Adapter], device: torch.device) -> None:
        """Make tables for what any of the adapters changes here; other layers have none."""
        self.a, self.b, parts = None, [], []
        for path, out in zip(self.paths, self.outs, strict=True):
            shapes = [adapter.factors[path] for adapter in adapters if path in adapter.factors]
            if shapes:
                self.b.append(torch.zeros(places, rank, len(shapes[0][1]), device=device))
                parts.append((path, out, shapes[0][0].shape[1]))
        self.parts = [(number, path, out) for number, (path, out, _) in enumerate(parts)]
        if parts:
            self.a = torch.zeros(places, len(parts), rank, parts[0][2], device=device)

    def fill(self, place: int, adapter: Adapter) -> None:
        """Put an adapter at a place."""
        if self.a is None:
            return
        self.a[place] = 0
        for number, path, _ in self.parts:
            self.b[number][place] = 0
            if path in adapter.factors:
                lora_a, lora_b = adapter.factors[path]
                self.a[place, number, : len(lora_a)] = lora_a
                self.b[number][place, : len(lora_a)] = lora_b.t()

    def add(self, y: Tensor, x: Tensor, only: str | None = None) -> None:
        """Add to the outputs y (M, out), in place, what the rows' adapters make of the inputs x (M, in).

        Args:
            only: y is the output of the layer at this path alone.
        """
        first, last, mask = self.bank.chosen
        parts = self.parts if only is None else [(n, path, slice(None)) for n, path, _ in self.parts if path == only]
        if self.a is None or first == last or not parts:
            return
        if mask is not None and len(mask) != len(x):
            raise LoryError(f"{len(x)} rows came to a layer in a batch of {len(mask)}; this model cannot mix adapters.")
        a = self.a[first:last, parts[0][0] : parts[-1][0] + 1]
        h = (x.to(a.dtype) @ a.flatten(0, 2).t()).view(len(x), last - first, len(parts), -1)
        if mask is not None:
            h = h * mask[:, :, None, None]
        for place, (number, _, out) in enumerate(parts):
            b = self.b[number][first:last].flatten(0, 1)
            part = h[:, :, place].reshape(len(x), -1)
            if y.dtype == b.dtype:
                y[:, out].addmm_(part, b)
            else:
                y[:, out] += (part @ b).to(y.dtype)


class AdapterBank:
    """The adapters of a model, and which of them the rows of the next forward have.

    Args:
        model: its linear layers get a hook that adds the adapters' parts.
        places: the most adapters that one batch can have; 156 MB for 8 of rank 16 on SmolLM2's linear layers.
    """

    def __init__(self, model: PreTrainedModel, places: int) -> None:
        self.model, self.most = model, places
        self.chosen: tuple[int, int, Tensor | None] = (0, 0, None)
        """The places from the first to before the last that have a part in this forward, and who has which: (M, last -
        first), None where all rows have the one."""
        self._adapters: dict[int, Adapter] = {}
        self._held: dict[int, int] = {}
        self._rows: tuple[int | None, ...] = ()
        self._paths = {module: path for path, module in model.named_modules()}
        self._products: dict[str, _Product] = {}
        self._hooked: set[str] = set()

    def __contains__(self, number: object) -> bool:
        return number in self._adapters

    def add(self, number: int, adapter: Adapter) -> None:
        """Take in an adapter under a number that no other has."""
        self._adapters[number] = adapter
        for path in sorted(adapter.factors.keys() - self._hooked):
            self._hook(path)
        self._allocate()

    def remove(self, number: int) -> None:
        """Forget an adapter; no row may have it."""
        del self._adapters[number]
        self._allocate()

    def select(self, rows: Sequence[int | None]) -> None:
        """Say which adapter each row of the next forwards has; None is the base alone."""
        if tuple(rows) == self._rows:
            return
        wanted = {row for row in rows if row is not None}
        for number in sorted(wanted - self._held.keys()):
            self._hold(number, wanted)
        self._rows = tuple(rows)
        if not wanted:
            self.chosen = 0, 0, None
            return
        places = [self._held[number] for number in wanted]
        first, last = min(places), max(places) + 1
        if len(set(rows)) == 1:
            self.chosen = first, last, None
            return
        own = [-1 if row is None else self._held[row] - first for row in rows]
        device = next(self.model.parameters()).device
        mask = torch.tensor(own, device=device)[:, None] == torch.arange(last - first, device=device)
        self.chosen = first, last, mask.float()

    def route(self, decoder: LeanDecoder) -> LeanDecoder:
        """A decoder with the adapters in each of its products; to be called before the first `add`."""
        routed = copy.copy(decoder)
        routed.layers = [
            replace(layer, **{field: self._wrap(getattr(layer, field), own, names) for field, names in _JOINED.items()})
            for layer, own in zip(decoder.layers, self.model.base_model.layers, strict=True)
        ]
        head = self.model.get_output_embeddings()
        routed.head = self._wrap_all(decoder.head, [head])
        return routed

    def _wrap(self, product: Product, layer: Any, names: Sequence[str]) -> Product:
        own = layer.self_attn if hasattr(layer.self_attn, names[0]) else layer.mlp
        return self._wrap_all(product, [getattr(own, name) for name in names])

    def _wrap_all(self, product: Product, linears: Sequence[Any]) -> Product:
        ends = [0]
        for linear in linears:
            ends.append(ends[-1] + linear.out_features)
        outs = [slice(*pair) for pair in pairwise(ends)]
        paths = [self._paths[linear] for linear in linears]
        tables = _Product(self, paths, outs)
        self._products |= dict.fromkeys(paths, tables)
        # a module is called without its hooks, which would add the same once more
        multiply: Callable[[Tensor], Tensor] = product.forward if isinstance(product, nn.Module) else product

        def run(x: Tensor) -> Tensor:
            y = multiply(x)
            tables.add(y, x)
            return y

        return run

    def _hook(self, path: str) -> None:
        tables = self._products.setdefault(path, _Product(self, [path], [slice(None)]))
        self._hooked.add(path)

        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tables.add(output.view(-1, output.shape[-1]), arguments[0].flatten(0, -2), only=path)
            return output

        self.model.get_submodule(path).register_forward_hook(add)

    def _allocate(self) -> None:
        adapters = list(self._adapters.values())
        device = next(self.model.parameters()).device
        rank = max((adapter.rank for adapter in adapters), default=0)
        for product in set(self._products.values()):
            product.allocate(min(self.most, len(adapters)), rank, adapters, device)
        self._held, self._rows, self.chosen = {}, (), (0, 0, None)

    def _hold(self, number: int, wanted: set[int]) -> None:
        """Give an adapter a place, that of one that is not wanted where all are taken."""
        places = min(self.most, len(self._adapters))
        free = set(range(places)) - set(self._held.values())
        if not free:
            leaves = next(held for held in self._held if held not in wanted)
            free = {self._held.pop(leaves)}
        self._held[number] = place = min(free)
        for product in set(self._products.values()):
            product.fill(place, self._adapters[number])
