"""The mathematics of LoRA as plain functions of tensors (Hu et al. 2021, arXiv 2106.09685, equation 3).

Shapes: N rows (batch and time together), R the rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

# elements of a block for each thread, about 1 MB in fp32: larger temporaries' fresh pages cost more than the arithmetic
_BLOCK = 2**18


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
    """What the adapter adds to the weight: ``scaling * B A``, (out, in) in fp32 or higher, also under autocast."""
    precise = torch.promote_types(lora_A.dtype, torch.float32)
    device = lora_A.device.type
    exact: contextlib.AbstractContextManager[Any] = (
        torch.autocast(device, enabled=False) if _is_autocast_on(device) else contextlib.nullcontext()
    )
    with exact:
        return (lora_B.to(precise) @ lora_A.to(precise)) * scaling


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``W x + bias + scaling * B A dropout(x)`` in one step: `low_rank` added to the base, in less time and memory.

    Args:
        x: (..., in).
        weight: (out, in); no gradient is computed for a frozen one.
        lora_A: (R, in), lora_B: (out, R); their product runs in their own dtype.
        dropout: probability of zeroing an element of the adapter's input; give 0.0 outside training.

    Returns:
        (..., out) in the base's dtype.
    """
    if _wants_plain_operations(x, weight):
        base = F.linear(x, weight, bias)
        return base + low_rank(x, lora_A, lora_B, scaling, dropout).to(base.dtype)
    run = _AdaptedLinear.apply if torch.is_grad_enabled() else _run_adapted_linear
    y: Tensor = run(x, weight, bias, lora_A, lora_B, scaling, dropout)[0]
    return y


def _wants_plain_operations(x: Tensor, weight: Tensor) -> bool:
    """Whether something looks into operations: compilers fuse them, autocast casts them, vmap and fx rewrite them."""
    return (
        torch.compiler.is_compiling()
        or has_torch_function((x, weight))
        or torch.jit.is_tracing()
        or _is_autocast_on(weight.device.type)
        # no public question for it; autograd.Function asks the same one
        or torch._C._are_functorch_transforms_active()
    )


def _is_autocast_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _run_adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`adapted_linear`'s output, A dropout(x) (N, R), and the mask of what the dropout kept, in x's shape."""
    mask = None
    if dropout and not x.is_cpu:
        kept, mask = torch.native_dropout(x.to(lora_A.dtype), dropout, True)
        h = _rows(kept) @ lora_A.t()
    else:
        if dropout:  # as F.dropout draws it, in x's strides
            mask = torch.empty_like(x, dtype=torch.uint8).bernoulli_(1.0 - dropout)
        h = _multiply_kept(x, mask, lora_A, 1.0 - dropout)
    y = _add_product(F.linear(_rows(x), weight, bias), h, lora_B.t(), scaling)
    return y.view(x.shape[:-1] + y.shape[-1:]), h, mask


def _multiply_kept(x: Tensor, mask: Tensor | None, lora_A: Tensor, keep: float) -> Tensor:
    """``A (mask * x / keep)``, (N, R)."""
    h = _join([kept @ lora_A.t() for _, kept in _take_kept(x, mask, lora_A.dtype)])
    return h if mask is None else h / keep


def _take_kept(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """``mask * x`` in `dtype`, (N, in), block by block of the rows, each a copy that is not kept; x itself where it is
    the same."""
    rows, masks = _rows(x), None if mask is None else _rows(mask)
    for block in _split_rows(rows, masks is None and x.dtype == dtype):
        kept = rows[block].to(dtype)
        yield block, kept if masks is None else _apply_mask(kept, masks[block])


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is one, else zero."""
    if not x.is_cpu:
        return x * mask
    # a CPU multiplies two dtypes by way of copies; and a byte becomes a float faster than a bool does
    return mask.to(x.dtype).mul_(x)


def _split_rows(x: Tensor, whole: bool = False) -> list[slice]:
    """Blocks of the rows of x (N, n): small ones on a CPU, one on other devices, or where `whole` says so."""
    if whole or not x.is_cpu or not len(x):
        return [slice(None)]
    # of equal size: a rest of a few rows costs nearly as much as a block
    blocks = max(1, round(x.numel() / (_BLOCK * torch.get_num_threads())))
    size = -(-len(x) // blocks)
    return [slice(start, start + size) for start in range(0, len(x), size)]


class _AdaptedLinear(torch.autograd.Function):
    """`adapted_linear` with its backward by hand.

    What plain operations would keep for the backward and this does not: the dropped-out input, its copy in the
    adapter's dtype and, on a CPU, the dropout's noise. Kept are x itself (shared with whoever made it), the R-wide
    product and one byte of mask an element. Both sums, of the output and of x's gradient, are made in the matrix
    product that adds to them, and copies in another dtype or under the mask exist for a block of rows at a time.
    All rests on ``g = dL/dy``, ``h = A dropout(x)``:
    dL/dB = s g^T h, dL/dh = s g B, dL/dA = (dL/dh)^T dropout(x), dL/dx = g W + mask / (1 - p) * (dL/dh A).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor]:
        y, h, mask = _run_adapted_linear(x, weight, bias, lora_A, lora_B, scaling, dropout)
        ctx.save_for_backward(x, weight, lora_A, lora_B, h, mask)
        ctx.scaling, ctx.keep = scaling, 1.0 - dropout
        return (y,)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, h, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        grad = _rows(grad)
        if need_B and torch.is_grad_enabled():  # for second derivatives: the h of the forward has no history
            h = _multiply_kept(x, mask, lora_A, ctx.keep)
        grad_B, grad_h = _split_gradient(grad, h if need_B else None, lora_B if need_x or need_A else None)
        grad_x = grad_A = None
        if grad_B is not None:
            grad_B = grad_B.mul(ctx.scaling).t()
        if grad_h is not None:
            # 1 / keep goes here, where it costs least
            grad_h = grad_h * (ctx.scaling / ctx.keep)
            if need_A:
                kept = _take_kept(x, mask, lora_A.dtype)
                grad_A = _add_up(grad_h[rows].t() @ block for rows, block in kept)
            if need_x:
                grad_x = grad @ weight
                if mask is None:
                    grad_x = _add_product(grad_x, grad_h, lora_A, 1.0)
                else:
                    _add_masked_product(grad_x, grad_h, lora_A, _rows(mask))
                grad_x = grad_x.reshape(x.shape)
        grad_weight = grad.t() @ _rows(x) if need_weight else None
        grad_bias = grad.sum(0) if need_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None


def _split_gradient(grad: Tensor, h: Tensor | None, lora_B: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``h^T g`` (R, out) and ``g B`` (N, R), each where its factor is given, with one cast of g for both."""
    factor = h if h is not None else lora_B
    if factor is None:
        return None, None
    product: Tensor | None = None
    parts = []
    for rows in _split_rows(grad, grad.dtype == factor.dtype):
        wide = grad[rows].to(factor.dtype)
        if h is not None:
            # not g^T h, since the wide matrix is read along its rows
            term = h[rows].t() @ wide
            product = term if product is None else product.add_(term)
        if lora_B is not None:
            parts.append(wide @ lora_B)
    return product, _join(parts) if parts else None


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_up(terms: Iterable[Tensor]) -> Tensor:
    """The sum, made in the first term."""
    return functools.reduce(Tensor.add_, terms)


def _rows(x: Tensor) -> Tensor:
    """(..., n) to (N, n)."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``y + scaling * left right`` in y's dtype, in y itself."""
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=scaling)
    for rows in _split_rows(y):
        if torch.promote_types(y.dtype, left.dtype) == left.dtype:
            # casting a narrow y twice is faster than adding two dtypes, and rounds once
            y[rows] = y[rows].to(left.dtype).addmm_(left[rows], right, alpha=scaling)
        else:
            y[rows].add_(left[rows] @ right, alpha=scaling)
    return y


def _add_masked_product(y: Tensor, left: Tensor, right: Tensor, mask: Tensor) -> None:
    """Add ``mask * left right`` to `y`, block by block of the rows, so that the product is never held as a whole."""
    for rows in _split_rows(mask):
        y[rows].add_(_apply_mask(left[rows] @ right, mask[rows]).to(y.dtype))
