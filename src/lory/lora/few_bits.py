"""What layers share whose frozen weight is held in few bits, by whatever library."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lory.lora.functional import low_rank
from lory.lora.linear import Linear


class FewBitsLinear(Linear):
    """y = Q x + b + scaling * B A x with Q frozen and in few bits; A and B, and their products, in their own precision.

    Nothing is ever merged: adding to Q would round the adapter away.
    """

    held_as: ClassVar[str]
    """What the weight is, in the words of errors."""

    def _multiply_frozen(self, x: Tensor) -> Tensor:
        """Q x, (..., out) in x's dtype, differentiable in x."""
        raise NotImplementedError

    def _changed_weight(self) -> Tensor:
        delta = self.delta_weight()
        return self.base_weight().to(delta.dtype) + delta

    def reset_parameters(self) -> None:
        """Draw the adapter anew; the frozen weight stays."""
        if self.has_adapter:
            self.reset_adapter()

    def merged_weight(self) -> Tensor:
        """Refused: so few bits cannot hold the adapter's change."""
        raise TypeError(
            f"An adapter is merged into the 16- or 32-bit weight that the {self.held_as} one was made from."
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's dtype."""
        y = self._multiply_frozen(x)
        if self.has_adapter:
            dropout = self.lora_dropout if self.training else 0.0
            wide = y + low_rank(x, *self._factors(), self.scaling, dropout)
            y = (wide * self.magnitude_scale() if self.has_magnitude else wide).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
