"""Which parameters of a model are trained and stored with its adapters."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from lory.lora.conv import ConvLoRA

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze all parameters that are not an adapter's (those called lora_...), but the biases that `bias` asks for.

    Args:
        bias: none; all biases of the model; or lora_only, the biases of layers with an adapter.

    Raises:
        ValueError: `bias` is something else; nothing is frozen then.
    """
    wanted = _wanted_biases(model, bias)
    for name, parameter in model.named_parameters():
        if not _is_adapter(name):
            parameter.requires_grad = False
    # after the freezing, and by all its names: a parameter may be shared
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted:
            parameter.requires_grad = True


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The part of the state dict that `mark_only_lora_as_trainable` with the same `bias` lets train.

    Load it with ``strict=False`` after the base's.

    Raises:
        ValueError: `bias` is not none, all or lora_only.
    """
    wanted = _wanted_biases(model, bias)
    return {name: value for name, value in model.state_dict().items() if _is_adapter(name) or name in wanted}


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2].startswith("lora_")


def _wanted_biases(model: nn.Module, bias: str) -> set[str]:
    """Names of the biases that are trained, all names of a shared one included."""
    if bias not in get_args(Bias):
        raise ValueError(f"bias='{bias}' was given; one of {', '.join(get_args(Bias))} is expected.")
    if bias == "none":
        return set()
    if bias == "all":
        names = (name for name, _ in model.named_parameters(remove_duplicate=False))
        # nn.LSTM and nn.MultiheadAttention have bias_ih_l0, in_proj_bias and the like
        return {name for name in names if "bias" in name.rpartition(".")[2].split("_")}
    wanted = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if any(_is_adapter(name) for name, _ in module.named_parameters(recurse=False)):
            own = "conv.bias" if isinstance(module, ConvLoRA) else "bias"
            wanted.add(f"{path}.{own}" if path else own)
    return wanted
