"""NF4 with int8 for the layers where 4 bits cost most: a loader that transformers is told of, as one of its own.

Which layers these are is a rule of shape, the same for every model: all but the widening ones, those with more outputs
than inputs. In a transformer the widening layers are the way into the feed-forward part, which are half of the weights
and forgive rounding best for their size; attention and the way out of the feed-forward part get int8. llama.cpp's
mixtures (Q4_K_M) favour the latter and the values, too.
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
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

METHOD = "lory_mixed_bits"


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


class _Quantize(ConversionOps):
    """transformers' own operation for NF4 or int8, as the layer wants it."""

    def __init__(self, quantizer: MixedBits) -> None:
        self.nf4, self.int8 = Bnb4bitQuantize(quantizer), Bnb8bitQuantize(quantizer)

    def convert(self, input_dict: dict[str, list[Tensor]], model: PreTrainedModel, **named: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            operation = self.int8 if isinstance(module, bnb.nn.Linear8bitLt) else self.nf4
            result |= operation.convert({name: value}, model=model, **named)
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
