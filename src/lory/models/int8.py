"""Weight-only int8 for generation on a CPU: a byte a weight, one scale for each output, nothing learnt on top.

Reading the weights is what a token's time goes into, and these are a quarter of fp32's. Each output's row is rounded to
``scale * q`` with q from -127 to 127; activations are rounded to bf16 on their way into a product (torch's kernel has
no other that is fast) and sums are taken in fp32. It is not bitsandbytes' int8, which is for training over a base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lory.lora as lora
from lory.lora import is_quantized

_LARGEST = 127
# Row maximum below which a row counts as zero: its scale would be no normal number
_SMALLEST = 1e-30
# From this many rows on, making bf16 weights for one large product is faster than the kernel for few rows
_MANY_ROWS = 64
# The kernel for few rows reads 16 inputs at a time and goes past the end of memory where they are not a multiple of it
_INPUTS_AT_ONCE = 32


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of each row: q (out, in) int8 and scale (out,) bf16, with weight about ``q * scale``."""
    weight = weight.detach().float()
    # the scale is rounded before it is used, so that its rounding costs nothing; up, so that q stays in its range
    scale = weight.abs().amax(dim=1).clamp(min=_SMALLEST) / _LARGEST * (1 + 2**-8)
    scale = scale.to(torch.bfloat16)
    q = (weight / scale.float()[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return q.to(torch.int8), scale


class Int8Linear(nn.Module):
    """``x W^T + b`` with the weight in int8; takes and gives any floating dtype."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Hold q (out, in) and scale (out,) of `round_rows`, and a bias (out,)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out) in the dtype of x."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        if len(rows) < _MANY_ROWS and self.in_features % _INPUTS_AT_ONCE == 0:
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype)
        else:
            out = F.linear(rows, self.weight.to(torch.bfloat16)).to(x.dtype) * self.scale.to(x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """A table of token vectors in int8, which may be the same tensors as a tied head's."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Hold q (V, H) and scale (V,) of `round_rows`; `dtype` is what is given out."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) ids to (..., H)."""
        return F.embedding(input_ids, self.weight).to(self.dtype) * F.embedding(input_ids, self.scale[:, None])


def quantize_weights(model: nn.Module) -> int:
    """Put int8 layers in the place of a model's linear layers and plain embeddings, in place; returns how many.

    An adapter of `lory.lora.Linear` is merged first. A tied weight stays one tensor. What is not a plain or an adapted
    linear layer, such as experts held as one tensor or layers that are quantized already, is left as it is.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def round_once(weight: Tensor) -> tuple[Tensor, Tensor]:
        if id(weight) not in done:
            done[id(weight)] = round_rows(weight)
        return done[id(weight)]

    count = 0
    # a list, so that weights live, and their ids mean them, until the end
    for path, module in list(model.named_modules()):
        new: nn.Module
        if type(module) is nn.Embedding:
            new = Int8Embedding(*round_once(module.weight), module.weight.dtype)
        elif is_plain_or_adapted(module):
            changed = isinstance(module, lora.Linear) and module.has_adapter
            pair = round_rows(module.merged_weight()) if changed else round_once(module.weight)
            new = Int8Linear(*pair, module.bias)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
        count += 1
    return count


def is_plain_or_adapted(module: nn.Module) -> bool:
    """Whether this is torch's linear layer or lory's, with a weight (out, in) of full precision."""
    if type(module) is lora.Linear:
        return not module.fan_in_fan_out and not is_quantized(module)
    return type(module) is nn.Linear
