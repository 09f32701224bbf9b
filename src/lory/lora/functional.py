"""The mathematics of LoRA as plain functions of tensors (Hu et al. 2021, arXiv 2106.09685, equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """The adapter's part of a layer's output: ``scaling * B A dropout(x)``.

    The product runs in the adapter's precision whatever the base's is, so that fp32 adapters learn on bf16 bases.

    Args:
        x: (..., in) the layer's input.
        lora_A: (R, in).
        lora_B: (out, R).
        dropout: probability of zeroing an input element; give 0.0 outside training.

    Returns:
        (..., out) in the adapter's dtype.
    """
    x = F.dropout(x.to(lora_A.dtype), dropout) if dropout else x.to(lora_A.dtype)
    # scaling the R-wide product costs less than scaling the out-wide one
    return F.linear(F.linear(x, lora_A) * scaling, lora_B)


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """What the adapter adds to the weight: ``scaling * B A``, (out, in) in fp32 or higher."""
    precise = torch.promote_types(lora_A.dtype, torch.float32)
    return (lora_B.to(precise) @ lora_A.to(precise)) * scaling
