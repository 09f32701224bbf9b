"""What all low-rank adapted layers share: their settings, the merged weight of eval mode, and how they are copied."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def scale_of(r: int, lora_alpha: float, rslora: bool) -> float:
    """What B A is multiplied by."""
    return lora_alpha / (math.sqrt(r) if rslora else r)


def norm_outputs(weight: Tensor, axis: int) -> Tensor:
    """The length of each output's row of a weight whose outputs lie along `axis`, (outputs,); never zero."""
    others = [i for i in range(weight.dim()) if i != axis]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others)
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


def spread(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """`values` (outputs,) in a shape that multiplies `weight`'s outputs, which lie along `axis`."""
    return values.view([-1 if i == axis else 1 for i in range(weight.dim())])


class LoRALayer(nn.Module):
    """Mixin of a layer with a frozen `weight` and a learnt low-rank change of it: ``W + scaling * B A``.

    `scaling` is lora_alpha / r, or lora_alpha / sqrt(r) with `rslora` (Kalajdzievski 2023, arXiv 2312.03732).

    The weight is never changed: what `state_dict` gives, in train and eval alike, is W, `lora_A` and `lora_B`. With
    ``merge_weights=True``, forwards in eval mode that need no gradient for them use ``W + delta`` as one weight. It is
    computed at the first such forward, held beside the parameters and dropped by `train`, `eval`, `to` and whatever
    changes a parameter. Only in-place edits through ``parameter.data`` go unseen: call `eval()` after one.

    Without an adapter (``r=0``) a layer is its plain torch class. `lora_dropout` is the probability, a number.

    With a `lora_magnitude` (see `add_magnitude`) the layer is DoRA's: each output's row of ``W + scaling * B A`` is
    scaled to a learnt length. With `lora_A0` and `lora_B0` (see `Linear.start_principal`) it is PiSSA's.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    merge_weights: bool
    scaling: float
    rslora: bool = False
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter
    output_axis: int = 0
    """The axis of the weight along which the outputs lie."""

    # a class attribute, since torch's constructors call reset_parameters before anything of ours is set
    _merged: tuple[_Key, Tensor] | None = None

    def _configure(
        self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, rslora: bool = False
    ) -> None:
        check_settings(r, lora_alpha, lora_dropout)
        self.r, self.lora_alpha, self.lora_dropout, self.merge_weights = r, lora_alpha, lora_dropout, merge_weights
        self.rslora = rslora

    @classmethod
    def _adopt(cls, base: nn.Module) -> Any:
        """A layer of this class with everything that `base` has: parameters (shared), settings, mode and hooks."""
        layer = cls.__new__(cls)
        # the registries are copied, so that what is added to the layer is not added to `base`
        layer.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in base.__dict__.items()})
        return layer

    def _add_adapter(self, shape_A: tuple[int, int], shape_B: tuple[int, int], dtype: torch.dtype) -> None:
        """Register `lora_A` and `lora_B`, yet without values (`reset_adapter` draws them), and freeze the weight."""
        place = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(shape_A, **place))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **place))
        self.scaling = scale_of(self.r, self.lora_alpha, self.rslora)
        self.weight.requires_grad = False

    @property
    def has_adapter(self) -> bool:
        """Whether there are a `lora_A` and a `lora_B`."""
        return "lora_A" in self._parameters

    @property
    def has_magnitude(self) -> bool:
        """Whether the layer is DoRA's."""
        return "lora_magnitude" in self._parameters

    def add_magnitude(self, lengths: Tensor | None = None) -> None:
        """Make the layer DoRA's (Liu et al. 2024, arXiv 2402.09353): learn the lengths of the changed weight's rows.

        Each forward that learns makes the changed weight as a whole, in fp32, for the norm of its rows; eval mode
        keeps the norms.

        Args:
            lengths: what `lora_magnitude` (outputs,) starts as; by default the lengths there are, so nothing changes.

        Raises:
            ValueError: there is not one length for each output.
        """
        self._merged = None
        if lengths is None:
            lengths = self._changed_norm()
        if lengths.shape != (outputs := self._count_outputs(),):
            raise ValueError(f"lengths of shape {tuple(lengths.shape)} were given; ({outputs},) is expected.")
        self.lora_magnitude = nn.Parameter(lengths.detach().to(self.lora_A, copy=True))

    def _count_outputs(self) -> int:
        return self.weight.shape[self.output_axis]

    @property
    def merged(self) -> bool:
        """Whether forwards without gradients use the merged weight now."""
        return self.has_adapter and self.merge_weights and not self.training

    def reset_adapter(self) -> None:
        """Draw A (Kaiming-uniform with a = sqrt(5), as nn.Linear does) and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight (before DoRA's scaling), in the weight's shape, in fp32 or higher."""
        raise NotImplementedError

    def _changed_weight(self) -> Tensor:
        delta = self.delta_weight()
        return self.weight.to(torch.promote_types(self.weight.dtype, delta.dtype)) + delta

    def merged_weight(self) -> Tensor:
        """``W + delta``, scaled if DoRA, in the weight's dtype, rounded once; a new tensor, differentiable."""
        weight = self._changed_weight()
        if self.has_magnitude:
            # the norm of what is at hand: no second product
            scale = self.lora_magnitude / norm_outputs(weight.detach(), self.output_axis)
            weight = weight * spread(scale, weight, self.output_axis)
        return weight.to(self.weight.dtype)

    @torch.no_grad()
    def _changed_norm(self) -> Tensor:
        return norm_outputs(self._changed_weight(), self.output_axis)

    def magnitude_scale(self) -> Tensor:
        """DoRA's factor of each output, (outputs,) in fp32 or higher: magnitude over norm of the changed weight.

        The norm is a constant to autograd, as in the paper's section 4.3.
        """

        def compute() -> Tensor:
            return self.lora_magnitude / self._changed_norm()

        held = None if self.training else self._hold(compute)
        return compute() if held is None else held

    def _held_weight(self) -> Tensor | None:
        """The merged weight where this forward may use it, else None."""
        return self._hold(self.merged_weight) if self.merged else None

    def _hold(self, compute: Callable[[], Tensor]) -> Tensor | None:
        """What `compute` gives, kept until a parameter changes; None where this forward may not use a kept value."""
        if torch.compiler.is_compiling():
            return None
        parameters = [self.weight, self.lora_A, self.lora_B, *([self.lora_magnitude] if self.has_magnitude else [])]
        # other types (of FSDP, functorch, quantization) and inference tensors do not tell when they change
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return None
        key = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
        if self._merged is None or self._merged[0] != key:
            # outside of inference mode, so that a later forward with gradients for x may use it too
            with torch.inference_mode(False), torch.no_grad():
                self._merged = key, compute()
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
        if self.rslora:
            adapter += ", rslora=True"
        return ", ".join(part for part in (super().extra_repr(), adapter) if part)
