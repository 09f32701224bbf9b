"""Memory of a training step on a CPU: where a layer's kept tensors lie, and that freed pages stay."""

from __future__ import annotations

import ctypes
import math
import platform
import sys

import torch
from torch import Tensor

# the names are those of mallopt(3) in glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell the C library, for the rest of the process, to hold on to freed memory; returns whether it will.

    A training step frees its tensors and the next one asks for the same sizes. By default glibc gives large ones back
    to the system at once, and pages that come anew cost more than the arithmetic on them: 37 ms to fill 50 MB against
    2.4 ms on a virtual machine. What is measured as the process's peak stays about the same, what it holds between
    two steps is the peak. Nothing is changed where the C library is not glibc.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


class Room:
    """Memory in one piece for the wide tensors that a layer keeps until its backward pass.

    Tensors that stay, each allocated among others that go, leave gaps that the next layer's do not fit: a layer of
    2,048 tokens of SmolLM2 keeps 42 MB, and in some runs 2.5 MB more lay idle.
    """

    # numbers: every tensor begins with a cache line of its own
    _LINE = 32

    def __init__(self, like: Tensor, tensors: int = 0, numbers: int = 0) -> None:
        """Room for so many tensors of so many numbers in all, in the dtype of `like`, on its device."""
        self._free = like.new_empty(numbers + tensors * self._LINE)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor that holds anything; None where there is no room for it, or none of its dtype."""
        size = math.prod(shape)
        lines = -(-size // self._LINE) * self._LINE
        if dtype != self._free.dtype or lines > len(self._free):
            return None
        part, self._free = self._free[:size], self._free[lines:]
        return part.view(shape)
