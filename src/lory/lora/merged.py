"""A linear layer that stacks several projections, such as query, key and value, with an adapter for some of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lory.lora.layer import check_settings
from lory.lora.linear import LinearBase


class MergedLinear(LinearBase):
    """A linear layer whose output is cut into slices, each with a low-rank change of its own or none.

    With n adapted slices, `lora_A` is (n * r, in) and `lora_B` (outputs of these slices, r): the i-th adapted slice has
    rows ``i*r : (i+1)*r`` of A, and its own rows of B. Where no slice is adapted, it is a plain linear layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        out_slices: Sequence[int] | None = None,
        **linear_arguments: Any,
    ) -> None:
        """Arguments as in loralib, and `out_slices`.

        Args:
            enable_lora: for each slice, whether it has an adapter.
            out_slices: outputs of each slice, as grouped-query attention needs them; by default all equal.
            linear_arguments: nn.Linear's: bias, device, dtype.

        Raises:
            ValueError: r, lora_alpha or lora_dropout is out of range, or the slices don't add up.
        """
        check_settings(r, lora_alpha, lora_dropout)
        slices = _check_slices(out_features, enable_lora, out_slices)
        super().__init__(in_features, out_features, **linear_arguments)
        self._configure(r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora, self.out_slices = list(enable_lora), slices
        if r > 0 and any(enable_lora):
            adapted = [size for size, enabled in zip(slices, enable_lora, strict=True) if enabled]
            self._add_adapter((r * len(adapted), in_features), (sum(adapted), r), self.weight.dtype)
        self._draw(fan_in_fan_out)

    def _factors(self) -> tuple[Tensor, Tensor]:
        # B as one block-diagonal matrix (out, n * r), zero in the rows of plain slices: small, and all is one product
        count = sum(self.enable_lora)
        blocks, start = [], 0
        order = accumulate(self.enable_lora, initial=0)
        for size, enabled, index in zip(self.out_slices, self.enable_lora, order, strict=False):
            if enabled:
                block = self.lora_B[start : start + size]
                blocks.append(F.pad(block, (index * self.r, (count - 1 - index) * self.r)))
                start += size
            else:
                blocks.append(self.lora_B.new_zeros(size, count * self.r))
        return self.lora_A, torch.cat(blocks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={self.enable_lora}, out_slices={self.out_slices}"


def _check_slices(out_features: int, enable_lora: Sequence[bool], out_slices: Sequence[int] | None) -> list[int]:
    """Outputs of each slice."""
    count = len(enable_lora)
    if count == 0:
        raise ValueError("enable_lora is empty; one True or False for each slice of the output is expected.")
    if out_slices is None:
        if out_features % count:
            raise ValueError(
                f"enable_lora has {count} entries, which don't divide out_features={out_features}; "
                "give out_slices, the outputs of each slice, for unequal ones."
            )
        return [out_features // count] * count
    if len(out_slices) != count:
        raise ValueError(f"enable_lora has {count} entries and out_slices has {len(out_slices)}; one each is expected.")
    if sum(out_slices) != out_features or min(out_slices) < 1:
        raise ValueError(
            f"out_slices={list(out_slices)} was given; positive numbers that add up to out_features={out_features} "
            "are expected."
        )
    return list(out_slices)
