"""Bases whose frozen linear layers are held and multiplied in FP8, on GPUs from Hopper on."""

from __future__ import annotations

import torch
from torch import nn

import lory.lora as lora
from lory.lora.fp8 import MULTIPLE, LinearFp8
from lory.runtime import UsageError, log

# Hopper: FP8 products with a scale for each row
CAPABILITY = (9, 0)


def check_fp8(device: torch.device) -> None:
    """Refuse FP8 where there are no products for it.

    Raises:
        UsageError: the device is no NVIDIA GPU of compute capability 9.0 or later.
    """
    if device.type != "cuda":
        found = f"the device is '{device}'"
    elif (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        found = f"'{torch.cuda.get_device_name(device)}' has compute capability {capability[0]}.{capability[1]}"
    else:
        return
    raise UsageError(
        f"model.fp8 is true, which needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, but {found}; set "
        "model.fp8 to false."
    )


def hold_in_fp8(model: nn.Module) -> int:
    """Round the frozen linear layers to FP8, in place, but for the head; to be called once the adapter is attached.

    Layers stay as they are whose weight is trained, shared with the embeddings, transposed, or of sizes that are no
    multiples of 16; a warning names the number of the last.

    Returns:
        How many layers were rounded.
    """
    apart = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    shared = {id(model.get_input_embeddings().weight)}
    rounded, odd = 0, 0
    for path, layer in list(model.named_modules()):
        if type(layer) not in (nn.Linear, lora.Linear) or id(layer) in apart or id(layer.weight) in shared:
            continue
        if layer.weight.requires_grad or getattr(layer, "fan_in_fan_out", False):
            continue
        if any(size % MULTIPLE for size in layer.weight.shape):
            odd += 1
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LinearFp8.from_layer(layer))
        rounded += 1
    if odd:
        log.warning("%d linear layers are not held in FP8, since their sizes are no multiples of %d.", odd, MULTIPLE)
    if not rounded:
        raise UsageError(
            "model.fp8 is true, but no linear layer is left for FP8: all are trained, quantized or of odd sizes; set "
            "model.fp8 to false."
        )
    log.info("%d linear layers are held in FP8, 8 bits a weight.", rounded)
    return rounded
