"""Convolutions with a low-rank adapter."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lory.lora.functional import delta_weight
from lory.lora.layer import LoRALayer, check_settings


class ConvLoRA(LoRALayer):
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

    def forward(self, x: Tensor) -> Tensor:
        """What `conv` makes of x with the changed weight."""
        if not self.has_adapter:
            return self.conv(x)
        if self.training and self.lora_dropout:
            change = self.delta_weight().to(self.weight.dtype)
            return self.conv(x) + self.conv._conv_forward(F.dropout(x, self.lora_dropout), change, None)
        held = self._held_weight()
        # _conv_forward is how the convolution itself brings in padding_mode, stride, dilation and groups
        return self.conv._conv_forward(x, self.merged_weight() if held is None else held, self.bias)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, in the weight's shape, in fp32 or higher."""
        return delta_weight(self.lora_A, self.lora_B, self.scaling).view(self.weight.shape)

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
