"""What all low-rank adapted layers share: their settings, the merged weight of eval mode, and how they are copied."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_Key = tuple[tuple[int, int, torch.dtype, torch.device], ...]


def check_settings(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: a negative rank, an alpha of an adapter that is not positive, or a dropout outside [0, 1).
    """
    if r < 0:
        raise ValueError(f"r={r} was given; a rank is 0 (no adapter) or more.")
    if r > 0 and not (lora_alpha > 0 and math.isfinite(lora_alpha)):
        raise ValueError(f"lora_alpha={lora_alpha} was given; a positive number is expected, often r or 2 * r.")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout={lora_dropout} was given; a probability from 0 to below 1 is expected.")


class LoRALayer(nn.Module):
    """Mixin of a layer with a frozen `weight` and a learnt low-rank change of it: ``W + (lora_alpha / r) * B A``.

    The weight is never changed: what `state_dict` gives, in train and eval alike, is W, `lora_A` and `lora_B`. With
    ``merge_weights=True``, forwards in eval mode that need no gradient for them use ``W + delta`` as one weight. It is
    computed at the first such forward, held beside the parameters and dropped by `train`, `eval`, `to` and whatever
    changes a parameter. Only in-place edits through ``parameter.data`` go unseen: call `eval()` after one.

    Without an adapter (``r=0``) a layer is its plain torch class. `lora_dropout` is the probability, a number.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    merge_weights: bool
    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    # a class attribute, since torch's constructors call reset_parameters before anything of ours is set
    _merged: tuple[_Key, Tensor] | None = None

    def _configure(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        check_settings(r, lora_alpha, lora_dropout)
        self.r, self.lora_alpha, self.lora_dropout, self.merge_weights = r, lora_alpha, lora_dropout, merge_weights

    def _add_adapter(self, shape_A: tuple[int, int], shape_B: tuple[int, int], dtype: torch.dtype) -> None:
        """Register `lora_A` and `lora_B`, yet without values (`reset_adapter` draws them), and freeze the weight."""
        place = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(shape_A, **place))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **place))
        self.scaling = self.lora_alpha / self.r
        self.weight.requires_grad = False

    @property
    def has_adapter(self) -> bool:
        """Whether there are a `lora_A` and a `lora_B`."""
        return "lora_A" in self._parameters

    @property
    def merged(self) -> bool:
        """Whether forwards without gradients use the merged weight now."""
        return self.has_adapter and self.merge_weights and not self.training

    def reset_adapter(self) -> None:
        """Draw A (Kaiming-uniform with a = sqrt(5), as nn.Linear does) and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, in the weight's shape, in fp32 or higher."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """``W + delta`` in the weight's shape and dtype, rounded once; a new tensor, differentiable."""
        delta = self.delta_weight()
        wide = torch.promote_types(self.weight.dtype, delta.dtype)
        return (self.weight.to(wide) + delta).to(self.weight.dtype)

    def _held_weight(self) -> Tensor | None:
        """The merged weight where this forward may use it, else None."""
        if not self.merged or torch.compiler.is_compiling():
            return None
        parameters = (self.weight, self.lora_A, self.lora_B)
        # other types (of FSDP, functorch, quantization) and inference tensors do not tell when they change
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return None
        key = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
        if self._merged is None or self._merged[0] != key:
            # outside of inference mode, so that a later forward with gradients for x may use it too
            with torch.inference_mode(False), torch.no_grad():
                self._merged = key, self.merged_weight()
        return self._merged[1]

    def train(self, mode: bool = True) -> Any:
        """As in torch; drops the merged weight."""
        self._merged = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **named: Any) -> Any:
        self._merged = None
        return super()._apply(*arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_merged": None}

    def extra_repr(self) -> str:
        adapter = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}" if self.r else ""
        return ", ".join(part for part in (super().extra_repr(), adapter) if part)
