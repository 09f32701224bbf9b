"""`import lory.lora as lora`: low-rank adapted layers and their mathematics."""

from lory.lora.functional import delta_weight, low_rank
from lory.lora.layers import Linear

__all__ = ["Linear", "delta_weight", "low_rank"]
