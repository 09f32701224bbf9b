"""Linear layers with a low-rank adapter over a weight that bitsandbytes holds in 4 or 8 bits.

Only import this where there is such a layer: it needs bitsandbytes, which is optional and takes seconds to import
(`lory.lora` does so when one of the names here is asked for).
"""

from __future__ import annotations

from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lory.lora.few_bits import FewBitsLinear

L = TypeVar("L", bound="QuantizedLinear")


class _SteadyState(bnb.MatmulLtState):
    """The state of an int8 layer that is taken for one in train mode always."""

    is_training = property(lambda self: True, lambda self, value: None)


def make_steady(layer: nn.Module) -> None:
    """Make one of bitsandbytes' layers compute the same in train and eval mode; to be done before its first forward.

    Otherwise, on CPUs: a 4-bit layer repacks its weight in eval mode, after which its gradients are wrong for good, in
    train mode, too; and an int8 layer rounds its input in eval mode only.
    """
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.support_avx512bf16_for_cpu = False
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        layer.state.__class__ = _SteadyState


class QuantizedLinear(FewBitsLinear):
    """What `Linear4bit` and `Linear8bit` share: y = Q x + b + scaling * B A x with Q, the quantized weight, frozen.

    A and B are fp32. Q x is computed by bitsandbytes, its gradient from Q's numbers (`base_weight`), and neither keeps
    anything for the backward pass; bitsandbytes' own int8 product holds its input, which defeats checkpointing.
    """

    held_as = "quantized"

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made from a layer that is quantized: use from_base.")

    @classmethod
    def from_base(  # type: ignore[override]
        cls: type[L],
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        rslora: bool = False,
    ) -> L:
        """A layer that shares `base`'s weight, its quantization state and its bias, all under the same names.

        Args:
            base: bitsandbytes' layer of the kind, already quantized (which happens when it is moved to its device).
            dtype: of the adapter.

        Raises:
            ValueError: the weight is not quantized, or was repacked for inference on a CPU.
        """
        cls._check_base(base)
        make_steady(base)  # it shares the weight and its state
        layer: L = cls._adopt(base)
        layer._configure(r, lora_alpha, lora_dropout, merge_weights=False, rslora=rslora)
        if r > 0:
            layer._add_adapter((r, layer.in_features), (layer.out_features, r), dtype)
            layer.reset_adapter()
        return layer

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        raise NotImplementedError

    def _count_outputs(self) -> int:
        return int(self.out_features)

    def _multiply(self, x: Tensor) -> Tensor:
        """Q x, (..., out) in x's dtype, by bitsandbytes' kernels."""
        raise NotImplementedError

    def _multiply_frozen(self, x: Tensor) -> Tensor:
        # compilers see through bitsandbytes' own operations, not through ours
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._multiply(x)
        y: Tensor = _FrozenProduct.apply(x, self)
        return y


class _FrozenProduct(torch.autograd.Function):
    """Q x of a quantized layer; dL/dx = g Q."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer._multiply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ ctx.layer.base_weight().to(grad.dtype) if ctx.needs_input_grad[0] else None), None


class Linear4bit(QuantizedLinear, bnb.nn.Linear4bit):
    """`lora.Linear` over bitsandbytes' NF4 or FP4 (Dettmers et al. 2023, arXiv 2305.14314)."""

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            raise ValueError("The layer's weight is not quantized yet; move the layer to its device first.")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "The layer ran in eval mode, for which bitsandbytes rounded its weight; load it anew and call "
                "make_steady before its first use."
            )

    def base_weight(self) -> Tensor:
        """Q as numbers, (out, in) in the dtype that it was quantized from."""
        weight: Tensor = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight

    def _multiply(self, x: Tensor) -> Tensor:
        wide = x if self.compute_dtype is None else x.to(self.compute_dtype)
        y: Tensor = bnb.matmul_4bit(wide, self.weight, quant_state=self.weight.quant_state)
        return y.to(x.dtype)


class Linear8bit(QuantizedLinear, bnb.nn.Linear8bitLt):
    """`lora.Linear` over bitsandbytes' int8 (Dettmers et al. 2022, arXiv 2208.07339).

    On a GPU the product rounds the input to int8, too; on a CPU it doesn't.
    """

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        if base.weight.dtype != torch.int8:
            raise ValueError(
                "The layer's weight is not int8 yet; make the layer with has_fp16_weights=False and move it to its "
                "device first."
            )

    def base_weight(self) -> Tensor:
        """Q as numbers, (out, in) in fp32."""
        scales = self.weight.SCB if self.state.SCB is None else self.state.SCB
        weight: Tensor = bnb.functional.int8_vectorwise_dequant(self.weight.data, scales)
        return weight

    def _multiply(self, x: Tensor) -> Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        y: Tensor = bnb.matmul(x, self.weight, state=self.state)
        return y


def adapt_quantized(
    base: nn.Module,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
) -> QuantizedLinear:
    """A quantized linear layer with an adapter that shares everything of `base`; see `QuantizedLinear.from_base`.

    Raises:
        TypeError: `base` is no linear layer of bitsandbytes.
        ValueError: its weight is not quantized yet, or was repacked.
    """
    for plain, kind in ((bnb.nn.Linear4bit, Linear4bit), (bnb.nn.Linear8bitLt, Linear8bit)):
        if isinstance(base, plain):
            return kind.from_base(base, r, lora_alpha, lora_dropout, dtype, rslora)
    raise TypeError(f"{type(base).__name__} was given; bitsandbytes' Linear4bit or Linear8bitLt is expected.")
