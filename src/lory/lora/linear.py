"""Linear layers with a low-rank adapter, and a way to turn a model's own linear layers into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.lora.functional import adapted_linear, delta_weight
from lory.lora.layer import LoRALayer, check_settings


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes, or a `Linear4bit` or `Linear8bit` made from one."""
    # by name: such a layer cannot be there without bitsandbytes, and asking must not import it
    return isinstance(module, nn.Linear) and any(c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


class LinearBase(LoRALayer, nn.Linear):
    """What `Linear` and `MergedLinear` share: everything but how the full A and B come about."""

    fan_in_fan_out: bool = False

    @property
    def output_axis(self) -> int:  # type: ignore[override]
        """The axis of the weight along which the outputs lie."""
        return int(self.fan_in_fan_out)

    def base_weight(self) -> Tensor:
        """W, in numbers that can be computed with."""
        return self.weight

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) with delta = scaling * B A."""
        return self.lora_A, self.lora_B

    def _draw(self, fan_in_fan_out: bool) -> None:
        # loralib draws the base weight a second time here; so do we, for the same values from the same seed
        self.reset_parameters()
        if fan_in_fan_out:
            self._transpose_weight()
            self.fan_in_fan_out = True

    def _transpose_weight(self) -> None:
        # contiguous, since safetensors writes nothing else
        self.weight.data = self.weight.data.t().contiguous()

    def reset_parameters(self) -> None:
        """Draw the base weight anew, and the adapter with it where there is one."""
        if self.fan_in_fan_out:
            self._transpose_weight()  # the bounds come from the weight's shape
        super().reset_parameters()
        if self.fan_in_fan_out:
            self._transpose_weight()
        if self.has_adapter:
            self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the base weight's dtype."""
        held = self._held_weight()
        weight = self.weight if held is None else held
        if self.fan_in_fan_out:
            weight = weight.t()
        if held is not None or not self.has_adapter:
            return F.linear(x, weight, self.bias)
        dropout = self.lora_dropout if self.training else 0.0
        if not self.has_magnitude:
            return adapted_linear(x, weight, self.bias, *self._factors(), self.scaling, dropout)
        y = adapted_linear(x, weight, None, *self._factors(), self.scaling, dropout)
        scaled = y * self.magnitude_scale()
        return (scaled if self.bias is None else scaled + self.bias).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight: (out, in), or (in, out) with fan_in_fan_out; in fp32 or higher."""
        lora_A, lora_B = self._factors()
        if self.fan_in_fan_out:
            return delta_weight(lora_B.t(), lora_A.t(), self.scaling)
        return delta_weight(lora_A, lora_B, self.scaling)


class Linear(LinearBase):
    """A linear layer y = W x + b + (lora_alpha / r) B A x: W frozen, `lora_A` (r, in) and `lora_B` (out, r) learnt.

    A starts Kaiming-uniform and B at zero, so a fresh layer answers like its base. The product with the adapter runs
    in the adapter's dtype, and the result has the base's.
    """

    lora_A0: Tensor
    lora_B0: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **linear_arguments: Any,
    ) -> None:
        """Arguments as in loralib.

        Args:
            fan_in_fan_out: the weight is stored as (in, out), as GPT-2's Conv1D does.
            merge_weights: eval mode uses W + delta as one weight (see `LoRALayer`).
            linear_arguments: nn.Linear's: bias, device, dtype.

        Raises:
            ValueError: r, lora_alpha or lora_dropout is out of range.
        """
        check_settings(r, lora_alpha, lora_dropout)
        super().__init__(in_features, out_features, **linear_arguments)
        self._configure(r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            self._add_adapter((r, in_features), (out_features, r), self.weight.dtype)
        self._draw(fan_in_fan_out)

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
        rslora: bool = False,
    ) -> Linear:
        """A layer that shares `base`'s weight and bias (the same Parameters, under the same names) and never merges.

        Args:
            base: an nn.Linear, or with fan_in_fan_out a transformers Conv1D, whose weight is (in, out).
            dtype: of the adapter; by default fp32, or the weight's own when that is wider.
        """
        layer: Linear = cls._adopt(base)
        layer.out_features, layer.in_features = base.weight.shape[::-1] if fan_in_fan_out else base.weight.shape
        layer.fan_in_fan_out = fan_in_fan_out
        layer._configure(r, lora_alpha, lora_dropout, merge_weights=False, rslora=rslora)
        if r > 0:
            dtype = dtype or torch.promote_types(base.weight.dtype, torch.float32)
            layer._add_adapter((r, layer.in_features), (layer.out_features, r), dtype)
            layer.reset_adapter()
        return layer

    @property
    def has_start(self) -> bool:
        """Whether the adapter's change counts from where it started (PiSSA) rather than from zero."""
        return "lora_A0" in self._buffers

    @torch.no_grad()
    def start_principal(self) -> None:
        """Start A and B as PiSSA does (Meng et al. 2024, arXiv 2404.02948): ``scaling * B A`` is W's best rank-r part.

        PiSSA takes that part off the weight. Here the weight stays as it is, for whoever shares it, and the start is
        taken off the change, which is the same function: W + scaling * (B A - B0 A0). The SVD runs in fp32 or higher.
        """
        weight = self.base_weight().t() if self.fan_in_fan_out else self.base_weight()
        left, values, right = torch.linalg.svd(weight.to(self.lora_A.dtype), full_matrices=False)
        roots = (values[: self.r] / self.scaling).sqrt()
        self.set_start((roots[:, None] * right[: self.r]).contiguous(), left[:, : self.r] * roots)
        self.lora_A.copy_(self.lora_A0)
        self.lora_B.copy_(self.lora_B0)

    def set_start(self, lora_A0: Tensor, lora_B0: Tensor) -> None:
        """Count the adapter's change from A0 (r, in) and B0 (out, r)."""
        self._merged = None
        self.register_buffer("lora_A0", lora_A0)
        self.register_buffer("lora_B0", lora_B0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        if not self.has_start:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], dim=1)
