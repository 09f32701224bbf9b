"""Layers with a low-rank adapter: loralib's names and arguments, and a way to turn a model's own layers into them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.lora.functional import delta_weight, low_rank


class Linear(nn.Linear):
    """A linear layer y = W x + b + (alpha / r) B A x, W frozen, A and B learnt (Hu et al. 2021, equation 3).

    A starts Kaiming-uniform and B at zero, so a fresh layer answers like its base. With ``r=0`` it is a plain
    `nn.Linear`. The weight is never merged in place: what is stored is always W, `lora_A` (R, in)
    and `lora_B` (out, R).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        **linear_arguments: Any,
    ) -> None:
        super().__init__(in_features, out_features, **linear_arguments)
        self._add_adapter(r, lora_alpha, lora_dropout, self.weight.dtype)

    @classmethod
    def from_base(
        cls, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> Linear:
        """A layer that shares `base`'s weight and bias (the same Parameters, under the same names).

        Args:
            dtype: of the adapter; by default fp32, or the weight's own when that is wider.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = base.in_features, base.out_features
        layer.weight, layer.bias = base.weight, base.bias
        layer.train(base.training)
        layer._add_adapter(r, lora_alpha, lora_dropout, dtype or torch.promote_types(base.weight.dtype, torch.float32))
        return layer

    def _add_adapter(self, r: int, lora_alpha: float, lora_dropout: float, dtype: torch.dtype) -> None:
        if r < 0:
            raise ValueError(f"r={r} was given; a rank is 0 (no adapter) or more.")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={lora_dropout} was given; a probability from 0 to below 1 is expected.")
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        if r == 0:
            return
        self.scaling = lora_alpha / r
        place = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **place))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **place))
        self.weight.requires_grad = False
        self.reset_adapter()

    def reset_parameters(self) -> None:
        """Draw the base weight anew, and the adapter with it where there is one."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw A (Kaiming-uniform with a = sqrt(5), as nn.Linear does) and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the base weight's dtype."""
        y = F.linear(x, self.weight, self.bias)
        if self.r == 0:
            return y
        dropout = self.lora_dropout if self.training else 0.0
        return y + low_rank(x, self.lora_A, self.lora_B, self.scaling, dropout).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, (out, in) in fp32 or higher."""
        return delta_weight(self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        adapter = f", r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}" if self.r else ""
        return super().extra_repr() + adapter
