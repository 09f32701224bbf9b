"""The elementwise parts of a fused decoder layer: plain operations, few compiled ones, or Liger's kernels.

On a CPU plain operations do. A GPU spends more time on moving numbers to and from memory than on these operations, so
there each part wants to be one kernel. Liger's (the package liger-kernel) need no compilation; what torch.compile makes
is about as good, for about a minute at the start.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lory.models.fused_ops import add_normalise_gradient, measure_scale, normalise, rotate
from lory.runtime import UsageError

KernelsName = Literal["auto", "plain", "compiled", "liger"]


class Kernels:
    """Plain operations, and what others are in place of."""

    name = "plain"

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension."""
        return normalise(x, weight, measure_scale(x, eps))

    def add_normalise_gradient(self, total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`total` plus the gradient of `normalise` to x; `total` and `grad` are overwritten."""
        return add_normalise_gradient(total, grad, x, weight, measure_scale(x, eps))

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        return F.silu(gate).mul_(up)

    def gate_again(self, gate: Tensor, up: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """In the backward pass: what `gate_back` wants to have of it, and `gate`'s result if that is wanted."""
        opened = F.silu(gate)
        return opened, opened * up if wanted else None

    def gate_back(self, grad: Tensor, gate: Tensor, up: Tensor, opened: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients to gate and up of `gate`; `grad` and `opened` are overwritten."""
        assert opened is not None
        grad_up = opened.mul_(grad)
        return torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
        """Rotary embedding of x (T, N, D) by cos and sin (T, D), or its transposed product, in `out` if given."""
        return rotate(x, cos, sin, back, out)


PLAIN = Kernels()


class CompiledKernels(Kernels):
    """The plain operations, each part compiled for any number of tokens."""

    name = "compiled"

    def __init__(self, compile_part: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None) -> None:
        """`compile_part` makes a part fast; by default torch.compile does."""
        make = compile_part or functools.partial(torch.compile, dynamic=True)
        self._normalise = make(PLAIN.normalise)
        self._normalise_gradient = make(_normalise_gradient)
        self._gate = make(_gate)
        self._gate_back = make(_gate_back)
        self._rotate = make(PLAIN.rotate)

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As in `Kernels`."""
        return self._normalise(x, weight, eps)

    def add_normalise_gradient(self, total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As in `Kernels`; nothing is overwritten."""
        return self._normalise_gradient(total, grad, x, weight, eps)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """As in `Kernels`."""
        return self._gate(gate, up)

    def gate_again(self, gate: Tensor, up: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """As in `Kernels`; `gate_back` makes silu again, which costs nothing beside reading the gate."""
        return None, self._gate(gate, up) if wanted else None

    def gate_back(self, grad: Tensor, gate: Tensor, up: Tensor, opened: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in `Kernels`; nothing is overwritten."""
        return self._gate_back(grad, gate, up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
        """As in `Kernels`."""
        y = self._rotate(x, cos, sin, back)
        return y if out is None else out.copy_(y)


def _normalise_gradient(total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return add_normalise_gradient(total.clone(), grad.clone(), x, weight, measure_scale(x, eps))


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gate_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad


class LigerKernels(Kernels):
    """Liger's RMSNorm and SwiGLU (Hsu et al. 2024, arXiv 2410.10989) around plain rotations.

    Liger's rotation wants q and k at once and in place; the plain one is a twentieth of a layer's elementwise work.
    """

    name = "liger"

    def __init__(self) -> None:
        # by name: the package is not there where types are checked
        self._norm: Any = importlib.import_module("liger_kernel.ops.rms_norm")
        self._swiglu: Any = importlib.import_module("liger_kernel.ops.swiglu")

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As in `Kernels`."""
        y: Tensor = self._norm.rms_norm_forward(x.contiguous(), weight, eps, 0.0, "llama", None)[0]
        return y

    def add_normalise_gradient(self, total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As in `Kernels`."""
        x = x.contiguous()
        # once more, for the scales that its backward takes
        _, rows, scale, block, warps, casting = self._norm.rms_norm_forward(x, weight, eps, 0.0, "llama", None)
        change, _ = self._norm.rms_norm_backward(
            grad.contiguous(), rows, weight, scale, 0.0, casting, block, warps, True, None
        )
        return total.add_(change.view(total.shape))

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """As in `Kernels`."""
        y: Tensor = self._swiglu.swiglu_forward(gate.contiguous(), up.contiguous())[2]
        return y

    def gate_again(self, gate: Tensor, up: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """As in `Kernels`; its `gate_back` makes silu again."""
        return None, self.gate(gate, up) if wanted else None

    def gate_back(self, grad: Tensor, gate: Tensor, up: Tensor, opened: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in `Kernels`."""
        # it writes over gate and up, which autograd holds: a second backward would see them without a word
        grads: tuple[Tensor, Tensor] = self._swiglu.swiglu_backward(gate.clone(), up.clone(), grad.contiguous())
        return grads


def has_liger() -> bool:
    """Whether Liger's kernels can be used on a GPU here."""
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


@functools.cache
def _make(name: str) -> Kernels:
    return {"plain": lambda: PLAIN, "compiled": CompiledKernels, "liger": LigerKernels}[name]()


def choose_kernels(name: KernelsName, device: torch.device) -> Kernels:
    """The kernels of this name; auto is Liger's on CUDA where they are installed, and plain operations elsewhere.

    Raises:
        UsageError: Liger's are asked for, and cannot be had here.
    """
    if name == "auto":
        name = "liger" if device.type == "cuda" and has_liger() else "plain"
    if name == "liger" and (device.type != "cuda" or not has_liger()):
        raise UsageError(
            f"train.kernels is liger, which needs an NVIDIA or AMD GPU (the device is '{device}') and the package "
            "liger-kernel (pip install liger-kernel); set train.kernels to auto."
        )
    return _make(name)
