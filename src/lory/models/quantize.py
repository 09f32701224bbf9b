"""Base models whose linear layers are held in 4 or 8 bits by bitsandbytes; head, embeddings and norms never are.

`nf4` is NF4 for the layers that have more outputs than inputs, and int8 for the others (see `mixed_bits`): about 6 bits
a weight, and a fifth of what rounding costs otherwise. `nf4-pure` is NF4 throughout, 4.1 bits, as in the QLoRA paper
(arXiv 2305.14314): for models that would not fit otherwise.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

import lory.lora as lora
from lory.lora import is_quantized
from lory.runtime import UsageError, log

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Quantization = Literal["nf4", "nf4-pure", "int8"]

INSTALL = "pip install 'lory-llm[quantize]'"
# NF4 with double quantization: half a byte a weight, one byte for 64 weights' scale, and fp32 for 256 such scales
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# of all weights; below it a note on what is left in 16 or 32 bits would only be noise
_LEFT_SHARE = 0.5


def stored_quantization(config: PretrainedConfig) -> str | None:
    """How a model folder's weights are quantized already: nf4-pure, fp4, int8 or another method's name; None if not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_4bit"):
        return "nf4-pure" if values.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    if values.get("load_in_8bit"):
        return "int8"
    return str(values.get("quant_method", "unknown"))


def quantized_arguments(
    config: PretrainedConfig, quantize: Quantization | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What transformers' `from_pretrained` needs to load a base in few bits; empty where nothing is to be quantized.

    A folder that is quantized already is loaded as it is. What was loaded so goes through `prepare_for_training` and
    stays on `device`.

    Args:
        config: the model folder's.
        dtype: of what is not quantized, and of the products.

    Raises:
        UsageError: the folder is quantized in another way than `quantize` says, or bitsandbytes is not there.
    """
    stored = stored_quantization(config)
    # what is stored in 4 bits cannot be had in more
    asked = "nf4-pure" if quantize == "nf4" and stored else quantize
    if stored and asked and stored != asked:
        raise UsageError(
            f"model.quantize is {quantize}, but the model is quantized as {stored} already; set model.quantize to "
            "null, or give the original model."
        )
    if (stored or quantize) not in ("nf4", "nf4-pure", "fp4", "int8"):
        return {}
    _need_bitsandbytes()
    arguments: dict[str, Any] = {"device_map": {"": str(device)}}
    return arguments if stored else arguments | {"quantization_config": _describe(quantize, dtype)}


def _describe(quantize: Quantization | None, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # which modules are left out is for transformers to say: the head, what is tied to the embeddings, and the last
    if quantize == "nf4":
        from lory.models.mixed_bits import make_config

        return make_config(dtype)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _need_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"A quantized model needs the package bitsandbytes, which is not installed: run {INSTALL}.")
    # it warns at its import of a kernel that is not used here, and at each int8 product of the cast that it makes
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def prepare_for_training(model: PreTrainedModel) -> PreTrainedModel:
    """Make bitsandbytes' layers, where there are any, compute the same in train and eval mode (`lora.make_steady`).

    In place, and to be called before the first forward. Norms, head and embeddings stay in the dtype they were loaded
    in. Inputs need no gradient, not even for gradient checkpointing, as long as it is not the reentrant kind.
    """
    layers = [module for module in model.modules() if is_quantized(module)]
    for layer in layers:
        lora.make_steady(layer)
    if layers:
        plain = torch.finfo(model.dtype).bits
        log.info("%d linear layers take %.2f bits a weight in place of %d.", len(layers), count_bits(model), plain)
        _tell_what_is_left(model, layers)
    return model


def count_bits(model: nn.Module) -> float:
    """Bits a weight, its share of the scales counted, over the quantized layers of a loaded model that has some."""
    layers = [module for module in model.modules() if is_quantized(module)]
    taken = sum(_layer_bytes(layer.in_features, layer.out_features, _is_int8(layer)) for layer in layers)
    return 8 * taken / sum(layer.in_features * layer.out_features for layer in layers)


def _is_int8(layer: nn.Module) -> bool:
    # of the layers themselves, since importing bitsandbytes is for those who have it
    return layer.weight.dtype == torch.int8


def _layer_bytes(inputs: int, outputs: int, int8: bool) -> float:
    return inputs * outputs + 4 * outputs if int8 else inputs * outputs * _NF4_BYTES


def _tell_what_is_left(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    apart = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    few = sum(layer.in_features * layer.out_features for layer in layers)
    left = sum(
        parameter.numel()
        for module in model.modules()
        if id(module) not in apart and not is_quantized(module)
        for parameter in module.parameters(recurse=False)
    )
    if left > _LEFT_SHARE * (few + left):
        log.warning(
            "%s: only %.0f%% of the weights could be quantized; the rest, such as experts that are held as one tensor, "
            "is kept in %s.",
            type(model).__name__,
            100 * few / (few + left),
            str(model.dtype).removeprefix("torch."),
        )


def count_bytes(model: PreTrainedModel, dtype: torch.dtype, quantize: str | None) -> int:
    """What the weights of a model take once it is loaded; a plain one on the meta device, without adapters, will do.

    Args:
        quantize: as in `Quantization`, or what `stored_quantization` gave; None (or a method that is not known here)
            counts all in `dtype`.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    total = sum(parameter.numel() for parameter in model.parameters()) * float(dtype.itemsize)
    if quantize not in ("nf4", "nf4-pure", "fp4", "int8"):
        return round(total)
    skipped = get_keys_to_not_convert(model)
    for path, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, skipped):
            outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            int8 = quantize == "int8" or (quantize == "nf4" and inputs >= outputs)
            total += _layer_bytes(inputs, outputs, int8) - inputs * outputs * dtype.itemsize
    return round(total)
