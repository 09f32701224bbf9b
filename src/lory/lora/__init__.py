"""`import lory.lora as lora`: low-rank adapted layers in place of loralib's, and their mathematics.

Where bitsandbytes is installed, the names of `lory.lora.quantized` for its layers are here, too: `lora.Linear4bit`,
`lora.Linear8bit`, `lora.adapt_quantized` and `lora.make_steady`.
"""

from __future__ import annotations

from typing import Any

from lory.lora.conv import Conv1d, Conv2d, Conv3d, ConvBase, ConvLoRA, adapt_convolution
from lory.lora.embedding import Embedding
from lory.lora.functional import adapted_linear, delta_weight, low_rank
from lory.lora.layer import LoRALayer
from lory.lora.linear import Linear, is_quantized
from lory.lora.marking import lora_state_dict, mark_only_lora_as_trainable
from lory.lora.merged import MergedLinear
from lory.lora.parameter import ParameterLoRA, adapt_parameter

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBase",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "ParameterLoRA",
    "adapt_convolution",
    "adapt_parameter",
    "adapted_linear",
    "delta_weight",
    "is_quantized",
    "lora_state_dict",
    "low_rank",
    "mark_only_lora_as_trainable",
]


def __getattr__(name: str) -> Any:
    # bitsandbytes is optional and slow to import, so it is imported when one of its layers is asked for
    if name in ("Linear4bit", "Linear8bit", "adapt_quantized", "make_steady"):
        from lory.lora import quantized

        return getattr(quantized, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
