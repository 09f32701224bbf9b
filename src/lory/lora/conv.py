"""Convolutions with a low-rank adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.lora.functional import delta_weight
from lory.lora.layer import LoRALayer, check_settings, spread


class ConvBase(LoRALayer):
    """What `ConvLoRA` and the layers of `from_base` share: everything but where the convolution is."""

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What the convolution makes of x with the changed weight."""
        if not self.has_adapter:
            return self._convolve(x, self.weight, self.bias)
        if self.training and self.lora_dropout:
            return self._forward_with_dropout(x)
        held = self._held_weight()
        return self._convolve(x, self.merged_weight() if held is None else held, self.bias)

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        change = self.delta_weight().to(self.weight.dtype)
        y = self._convolve(x, self.weight, None if self.has_magnitude else self.bias)
        y = y + self._convolve(F.dropout(x, self.lora_dropout), change, None)
        if not self.has_magnitude:
            return y
        # the channels lie before the kernel's axes, with or without a batch
        channels = y.dim() - (self.weight.dim() - 2) - 1
        y = y * spread(self.magnitude_scale().to(y.dtype), y, channels)
        return y if self.bias is None else y + spread(self.bias, y, channels)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, in the weight's shape, in fp32 or higher."""
        return delta_weight(self.lora_A, self.lora_B, self.scaling).view(self.weight.shape)


class ConvLoRA(ConvBase):
    """A convolution `conv` whose weight W is frozen and gets the change (lora_alpha / r) B A, read as W's shape.

    With q the kernel's last size and p the product of its other ones (1 for Conv1d), and m = min(p, q), `lora_A` is
    (r*m, in*q) and `lora_B` (out//groups*p, r*m): B A has W's number of elements for any kernel, a rank in proportion
    to its size, and for square kernels loralib's shapes.

    Its state dict has loralib's keys: conv.weight, conv.bias, lora_A, lora_B. Loading also takes a plain convolution's
    `weight` and `bias`. Dropout works on the adapter's input, as in `Linear`.
    """

    def __init__(
        self,
        conv_module: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **conv_arguments: Any,
    ) -> None:
        """Arguments as in loralib.

        Args:
            conv_module: nn.Conv1d, nn.Conv2d or nn.Conv3d.
            merge_weights: eval mode uses W + delta as one weight (see `LoRALayer`).
            conv_arguments: the convolution's: stride, padding, groups, bias, device, dtype and so on.

        Raises:
            ValueError: r, lora_alpha or lora_dropout is out of range.
        """
        check_settings(r, lora_alpha, lora_dropout)
        super().__init__()
        self.conv = conv_module(in_channels, out_channels, kernel_size, **conv_arguments)
        self._configure(r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            *others, last = self.conv.kernel_size
            first = math.prod(others)
            rank = r * min(first, last)
            rows = out_channels // self.conv.groups * first
            self._add_adapter((rank, in_channels * last), (rows, rank), self.weight.dtype)
        # loralib draws the base weight a second time here; so do we, for the same values from the same seed
        self.reset_parameters()

    @property
    def weight(self) -> nn.Parameter:
        """The convolution's weight, (out, in // groups, *kernel)."""
        return self.conv.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The convolution's bias, (out,)."""
        return self.conv.bias

    def reset_parameters(self) -> None:
        """Draw the base weight anew, and the adapter with it where there is one."""
        self.conv.reset_parameters()
        if self.has_adapter:
            self.reset_adapter()

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # _conv_forward is how the convolution itself brings in padding_mode, stride, dilation and groups
        return self.conv._conv_forward(x, weight, bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in ("weight", "bias"):
            if (own := f"{prefix}{name}") in state_dict:
                state_dict.setdefault(f"{prefix}conv.{name}", state_dict.pop(own))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Conv1d(ConvLoRA):
    """nn.Conv1d with an adapter; arguments as `ConvLoRA`, without the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """nn.Conv2d with an adapter; arguments as `ConvLoRA`, without the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """nn.Conv3d with an adapter; arguments as `ConvLoRA`, without the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)


class _AdaptedConv(ConvBase):
    """A model's own convolution with an adapter: weight and bias under their own names, never merged.

    `lora_A` is (r, in * kernel) and `lora_B` (out, r): PEFT's convolutions of the same sizes, flattened.
    """

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class _AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    pass


class _AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    pass


class _AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    pass


_ADAPTED: dict[type[nn.Module], type[_AdaptedConv]] = {
    nn.Conv1d: _AdaptedConv1d,
    nn.Conv2d: _AdaptedConv2d,
    nn.Conv3d: _AdaptedConv3d,
}


def adapt_convolution(
    base: nn.Module,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    rslora: bool = False,
) -> ConvBase:
    """A layer that shares the weight and bias of `base` (the same Parameters, under the same names) and never merges.

    Args:
        base: an nn.Conv1d, nn.Conv2d or nn.Conv3d with one group.
        dtype: of the adapter; by default fp32, or the weight's own when that is wider.

    Raises:
        ValueError: `base` is something else, or has several groups.
    """
    if type(base) not in _ADAPTED:
        raise ValueError(f"A {type(base).__name__} was given; an nn.Conv1d, nn.Conv2d or nn.Conv3d is expected.")
    if base.groups != 1:
        raise ValueError(f"A convolution of {base.groups} groups was given; one group is expected.")
    layer: _AdaptedConv = _ADAPTED[type(base)]._adopt(base)
    layer._configure(r, lora_alpha, lora_dropout, merge_weights=False, rslora=rslora)
    if r > 0:
        dtype = dtype or torch.promote_types(base.weight.dtype, torch.float32)
        layer._add_adapter((r, base.weight[0].numel()), (base.out_channels, r), dtype)
        layer.reset_adapter()
    return layer
