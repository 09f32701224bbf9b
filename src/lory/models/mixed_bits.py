"""NF4 with int8 for the layers where 4 bits cost most: a loader that transformers is told of, as one of its own.

Which layers these are is a rule of shape, the same for every model: all but the widening ones, those with more outputs
than inputs. In a transformer the widening layers are the way into the feed-forward part, which are half of the weights
and forgive rounding best for their size; attention and the way out of the feed-forward part get int8. llama.cpp's
mixtures (Q4_K_M) favour the latter and the values, too. What is left to NF4 is clipped a little first (`clip_blocks`).
"""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

METHOD = "lory_mixed_bits"
# weights that share a scale in bitsandbytes' 4-bit kinds
_BLOCK = 64
# shares of a block's largest magnitude that are tried; finer steps gain next to nothing (relative error of SmolLM2's
# widening layers: 0.0932 with 1 alone, 0.0878 with 0.9, 0.0864 with these)
_CLIPS = (0.94, 0.88)
_BLOCKS_AT_ONCE = 2**16


class MixedBitsConfig(BitsAndBytesConfig):
    """What `from_pretrained` takes as its quantization_config: NF4's settings, and the name of `MixedBits`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        self.quant_method = METHOD


class MixedBits(Bnb4BitHfQuantizer):
    """Loads the widening linear layers as bitsandbytes' NF4, and the others as its int8."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *arguments: Any, **named: Any) -> None:
        super()._process_model_before_weight_loading(model, *arguments, **named)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, bnb.nn.Linear4bit) and layer.in_features >= layer.out_features:
                model.set_submodule(path, self._make_int8(layer))

    def _make_int8(self, layer: bnb.nn.Linear4bit) -> bnb.nn.Linear8bitLt:
        wide = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            has_fp16_weights=False,
            threshold=self.quantization_config.llm_int8_threshold,
            device="meta",
        )
        wide.source_cls = layer.source_cls  # whether the file's weight is transposed, which `_Quantize` asks
        return wide.requires_grad_(False)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether this is the weight of a layer that was replaced."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a file's weight into a layer's."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """No: a folder of such weights would be one that nothing else can read. The adapter is what is stored."""
        return False


def clip_blocks(weight: Tensor) -> Tensor:
    """The weight as NF4 rounds it best: in each block, what exceeds a share of the largest magnitude is drawn in.

    A block's scale is its largest magnitude, so one outlier widens the steps of the other 63. Of `_CLIPS` and 1, the
    share with the least sum of squared errors is taken. It costs no memory. A weight that does not fill whole blocks is
    left alone.
    """
    if weight.numel() % _BLOCK:
        return weight
    blocks = weight.reshape(-1, _BLOCK)
    return torch.cat([_clip(part.float()) for part in blocks.split(_BLOCKS_AT_ONCE)]).view_as(weight).to(weight.dtype)


def _clip(blocks: Tensor) -> Tensor:
    largest = blocks.abs().amax(1, keepdim=True)
    best, least = blocks, _count_error(blocks, blocks)
    for share in _CLIPS:
        clipped = torch.clamp(blocks, -share * largest, share * largest)
        error = _count_error(clipped, blocks)
        best = torch.where(error < least, clipped, best)
        least = torch.minimum(error, least)
    return best


def _count_error(clipped: Tensor, blocks: Tensor) -> Tensor:
    """Each block's sum of squared differences from what NF4 makes of it once it is clipped, (blocks, 1)."""
    few, state = bnb.functional.quantize_4bit(clipped, blocksize=_BLOCK, quant_type="nf4")
    return (bnb.functional.dequantize_4bit(few, state) - blocks).square().sum(1, keepdim=True)


class _Quantize(ConversionOps):
    """transformers' own operation for NF4 or int8, as the layer wants it."""

    def __init__(self, quantizer: MixedBits) -> None:
        self.nf4, self.int8 = Bnb4bitQuantize(quantizer), Bnb8bitQuantize(quantizer)

    def convert(self, input_dict: dict[str, list[Tensor]], model: PreTrainedModel, **named: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, values in input_dict.items():
            module, _ = get_module_from_name(model, name)
            if isinstance(module, bnb.nn.Linear8bitLt):
                result |= self.int8.convert({name: values}, model=model, **named)
                continue
            (value,) = values if isinstance(values, list) else [values]
            # transformers turns such a weight round before it is cut into blocks
            turned = issubclass(module.source_cls, Conv1D)
            clipped = clip_blocks(value.T).T if turned else clip_blocks(value)
            result |= self.nf4.convert({name: [clipped]}, model=model, **named)
        return result


@functools.cache
def _register() -> None:
    register_quantizer(METHOD)(MixedBits)


def make_config(dtype: torch.dtype) -> MixedBitsConfig:
    """A quantization_config that `from_pretrained` loads with `MixedBits`.

    Args:
        dtype: of the products.
    """
    _register()
    return MixedBitsConfig(dtype)
