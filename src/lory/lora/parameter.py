"""A low-rank change of a bare Parameter, such as a mixture of experts' weights that are held as one 3-D tensor."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from lory.lora.functional import delta_weight
from lory.lora.layer import LoRALayer, scale_of

_during_forward = threading.local()
"""`.weights`: what the adapted parameters read as, by (id of their module, name), while this thread's forward runs."""


class ParameterLoRA(LoRALayer):
    """The adapter of one Parameter: E stacked weights (E, out, in), or a single one (out, in).

    `lora_A` is (E, r, in) and `lora_B` (E, out, r); without E for a single one. `transposed` stacks are (E, in, out).
    The change cannot be dropped out (there is no input to it) and has no magnitude. While the module runs, its changed
    weights are held as a whole: as much memory again as the parameter takes.
    """

    def __init__(
        self, weight: nn.Parameter, r: int, lora_alpha: float, rslora: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        self._configure(r, lora_alpha, 0.0, merge_weights=False, rslora=rslora)
        self.transposed = transposed
        self.scaling = scale_of(r, lora_alpha, rslora)
        *stack, rows, columns = weight.shape
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        # fp32 or wider, whatever the parameter's own is
        place: dict[str, Any] = {
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        self.lora_A = nn.Parameter(torch.empty(*stack, r, inputs, **place))
        self.lora_B = nn.Parameter(torch.empty(*stack, outputs, r, **place))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw A as for so many linear layers, and set B to zero."""
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A.flatten(0, -2), a=5**0.5)
            nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the parameter, in its shape, in fp32 or higher."""
        delta = delta_weight(self.lora_A, self.lora_B, self.scaling)
        return delta.transpose(-2, -1) if self.transposed else delta

    def change(self, weight: Tensor) -> Tensor:
        """`weight` with the adapter in it, in its own dtype; differentiable."""
        delta = self.delta_weight()
        return (weight.to(delta.dtype) + delta).to(weight.dtype)


class _Host(nn.Module):
    """Mixin of a module whose forward finds changed weights where its parameters are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = _during_forward.__dict__.setdefault("weights", {})
        mine = {(id(self), name): layer.change(self._parameters[name]) for name, layer in parameter_layers(self)}
        weights.update(mine)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for key in mine:
                weights.pop(key, None)


def _read(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        held: Tensor | None = _during_forward.__dict__.get("weights", {}).get((id(module), name))
        return module._parameters[name] if held is None else held

    return property(read)


def parameter_layers(module: nn.Module) -> list[tuple[str, ParameterLoRA]]:
    """Name and adapter of each adapted parameter that `module` itself holds."""
    layers = ((key.removeprefix("lora_"), child) for key, child in module._modules.items())
    return [(name, child) for name, child in layers if isinstance(child, ParameterLoRA)]


def adapt_parameter(
    module: nn.Module, name: str, r: int, lora_alpha: float, rslora: bool = False, transposed: bool = False
) -> ParameterLoRA:
    """Give ``module.<name>`` an adapter, in place: the module's class becomes a subclass that reads the change, too.

    The parameter keeps its state-dict key; the adapter's are ``lora_<name>.lora_A`` and ``lora_<name>.lora_B``.
    Read from outside of the module's forward, the parameter is the unchanged one.
    """
    weight = module._parameters[name]
    if weight is None or weight.dim() not in (2, 3):
        raise ValueError(f"'{name}' is no parameter of 2 or 3 dimensions; stacked or single weights are expected.")
    layer = ParameterLoRA(weight, r, lora_alpha, rslora, transposed)
    layer.train(module.training)
    weight.requires_grad = False
    module.add_module(f"lora_{name}", layer)
    base = type(module) if not isinstance(module, _Host) else type(module).__mro__[2]
    properties = {own: _read(own) for own, _ in parameter_layers(module)}
    module.__class__ = type(base.__name__, (_Host, base), properties | {"__module__": base.__module__})
    return layer
