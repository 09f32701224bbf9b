"""Attention of documents in a row by kernels that other devices than CPUs have.

In this order: the flash-attn package, torch's own variable-length flash attention, and torch's fused attention document
by document. The first two take all documents at once, in half precision.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = Literal["flash-attn", "torch", "documents"]

# of both flash kernels
_LARGEST_HEAD = 256
_CAPABILITY = (8, 0)


class Spans(NamedTuple):
    """Where documents lie in a row."""

    borders: tuple[int, ...]
    """(documents + 1) from 0 to T."""
    offsets: Tensor
    """(documents + 1) the same, int32 on the row's device."""

    @classmethod
    def of(cls, borders: tuple[int, ...], device: torch.device) -> Spans:
        """The borders with their copy on the device."""
        return cls(borders, torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(end - start for start, end in zip(self.borders[:-1], self.borders[1:], strict=True))


def choose_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0, softcap: float | None = None
) -> Kernel:
    """The fastest kernel here that computes what is asked for."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or head_dim > _LARGEST_HEAD or not _has_flash(device.index or 0):
        return "documents"
    if _has_package():
        return "flash-attn"
    # a softmax that is capped or dropped from is more than torch's kernel does
    return "documents" if dropout or softcap or head_dim % 8 else "torch"


@functools.cache
def _has_flash(index: int) -> bool:
    # AMD's numbers mean something else
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= _CAPABILITY


@functools.cache
def _has_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scaling: float,
    window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each document, differentiable.

    Args:
        q: (T, N, D).
        k, v: (T, G, D).
        window: a token sees this many tokens, itself included.
        softcap: only with the flash-attn package.

    Returns:
        (T, N, D).
    """
    kernel = choose_kernel(q.device, q.dtype, q.shape[-1], dropout, softcap)
    if kernel == "flash-attn":
        return _run_package(q, k, v, spans, scaling, window, dropout, softcap)
    if kernel == "torch":
        return _run_torch(q, k, v, spans, scaling, window)
    if softcap is not None:
        raise ValueError("capped attention needs the flash-attn package here")
    return _run_documents(q, k, v, spans, scaling, window, dropout)


def _sides(window: int | None) -> tuple[int, int]:
    """How many tokens a query sees before and after itself; -1: all."""
    return (-1 if window is None else window - 1, 0)


def _run_package(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scaling: float,
    window: int | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    run = importlib.import_module("flash_attn").flash_attn_varlen_func
    longest = spans.longest
    y: Tensor = run(
        q,
        k,
        v,
        spans.offsets,
        spans.offsets,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=_sides(window) if window is not None else (-1, -1),
        softcap=softcap or 0.0,
    )
    return y


@functools.cache
def _torch_kernel() -> tuple[Callable[..., Tensor], bool]:
    """torch's function, and whether it lets heads share keys, which torch 2.11 does not yet."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _run_torch(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scaling: float, window: int | None) -> Tensor:
    run, groups = _torch_kernel()
    options: dict[str, Any] = {"scale": scaling, "window_size": _sides(window)}
    if q.shape[1] != k.shape[1]:
        if groups:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return run(q, k, v, spans.offsets, spans.offsets, spans.longest, spans.longest, **options)


def _run_documents(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scaling: float, window: int | None, dropout: float
) -> Tensor:
    parts = []
    for start, end in zip(spans.borders[:-1], spans.borders[1:], strict=True):
        one_q, one_k, one_v = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        mask = None
        if window is not None and end - start > window:
            mask = ~hidden(end - start, window, q.device)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            one_q, one_k, one_v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


def hidden(length: int, window: int | None, device: torch.device) -> Tensor:
    """(t, t) true where a token of a document must not look: ahead, or further back than the window."""
    ahead = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return ahead if window is None else ahead | torch.ones_like(ahead).tril(-window)


class Recorded(NamedTuple):
    """An attention whose gradients can be had once, without its forward again."""

    out: Tensor
    leaves: tuple[Tensor, Tensor, Tensor]

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to q, k and v; `grad` is (T, N, D)."""
        grad_q, grad_k, grad_v = torch.autograd.grad(self.out, self.leaves, grad)
        return grad_q, grad_k, grad_v


def record(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scaling: float, window: int | None) -> Recorded:
    """`attend_spans` with what its kernel keeps for the backward pass; from inside of an autograd function, too."""
    with torch.enable_grad():
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        return Recorded(attend_spans(*leaves, spans, scaling, window), leaves)
