"""`import lory.lora as lora`: low-rank adapted layers in place of loralib's, and their mathematics."""

from lory.lora.conv import Conv1d, Conv2d, Conv3d, ConvBase, ConvLoRA, adapt_convolution
from lory.lora.embedding import Embedding
from lory.lora.functional import adapted_linear, delta_weight, low_rank
from lory.lora.layer import LoRALayer
from lory.lora.linear import Linear
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
    "lora_state_dict",
    "low_rank",
    "mark_only_lora_as_trainable",
]
