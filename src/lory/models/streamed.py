"""A model run while its weights stay on disk: each module's are brought when it runs and dropped when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lory.architectures import find_model_class
from lory.models.load import first_line, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotStreamable(Exception):
    """This model has to be loaded as a whole; the message is the reason, as a clause."""


def make_empty(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal language model of a folder in eval mode: parameters on the meta device, buffers real on `device`.

    Raises:
        NotStreamable: it is quantized, is no causal language model, or keeps a part of itself in another precision.
    """
    from accelerate import init_empty_weights

    config = load_config(path)
    if getattr(config, "quantization_config", None):
        raise NotStreamable("it is quantized")
    try:
        # not torch.device("meta"), which would leave the buffers without values, too
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = find_model_class(config).from_config(config, dtype=dtype)
    except (ValueError, RuntimeError) as error:
        raise NotStreamable(f"it cannot be made without its weights ({first_line(error)})") from error
    if dtype != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        raise NotStreamable(f"it keeps a part of itself in float32 beside {dtype}")
    for module in model.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    return model.eval()


@contextlib.contextmanager
def bring_weights(model: nn.Module, fetch: Callable[[str], Tensor]) -> Iterator[None]:
    """Let `model` run while the block does, though its parameters are on the meta device.

    Before a module's forward `fetch` is asked for the parameters that the module itself holds, by their names in the
    state dict; after it they are dropped. Parameters that are real already are left alone.

    Raises:
        NotStreamable: the block raised a RuntimeError, as it does where a parameter is used outside of its module's
            forward.
    """
    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            empty = {name: p for name, p in module._parameters.items() if p is not None and p.is_meta}
            if empty:
                _hook(stack, module, f"{path}." if path else "", empty, fetch)
        try:
            yield
        except RuntimeError as error:
            raise NotStreamable(f"it does not run a module at a time ({first_line(error)})") from error


def _hook(
    stack: contextlib.ExitStack,
    module: nn.Module,
    prefix: str,
    empty: dict[str, nn.Parameter],
    fetch: Callable[[str], Tensor],
) -> None:
    def bring(module: nn.Module, _: Any) -> None:
        for name in empty:
            module._parameters[name] = nn.Parameter(fetch(prefix + name), requires_grad=False)

    def drop(module: nn.Module, *_: Any) -> None:
        module._parameters.update(empty)

    stack.callback(module.register_forward_pre_hook(bring).remove)
    stack.callback(module.register_forward_hook(drop, always_call=True).remove)
