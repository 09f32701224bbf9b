"""The model as it was before its adapter, for as long as a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lory.adapters.inject import adapted_layers, whole_tensors
from lory.runtime import UsageError


def check_removable(model: nn.Module, field: str) -> None:
    """Refuse a model whose adapter is more than a change that is added to weights; `field` asks for it.

    Raises:
        UsageError: it has no low-rank adapter, or learns lengths (DoRA) or whole modules beside it.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers or whole_tensors(model).tensors or any(layer.has_magnitude for layer in layers):
        raise UsageError(
            f"{field} needs the model as it was, which an adapter of another type than lora, or one with "
            f"modules_to_save, does not keep; use adapter.type=lora without them, or set {field} to 0."
        )


@contextlib.contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Take the adapter's change out of a model in train mode; no weight is touched."""
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = 0.0
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
