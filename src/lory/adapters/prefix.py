"""Prefix tuning: learnt keys and values that every layer's attention sees before the text's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lory.adapters.encoders import SoftPrompt
from lory.adapters.virtual_tokens import input_embedding
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

NAME = "lory_prefix"


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of a token: in each of `layers`, the keys and values of `heads`, `head_dim` numbers each."""

    layers: int
    heads: int
    head_dim: int

    @property
    def token_dim(self) -> int:
        """Numbers of one layer's keys; PEFT's name."""
        return self.heads * self.head_dim

    @property
    def size(self) -> int:
        """Numbers of all keys and values of one token."""
        return 2 * self.layers * self.token_dim


class Prefix(nn.Module):
    """The prefix of a model, kept as its module `lory_prefix`; the model's forward has to be given it."""

    def __init__(self, prompt: SoftPrompt, shape: CacheShape) -> None:
        super().__init__()
        self.prompt, self.shape = prompt, shape

    def forward(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(2 * layers, rows, heads, tokens, head_dim): keys of layer 0, values of layer 0, keys of layer 1, ..."""
        shape = self.shape
        vectors = self.prompt().to(dtype).view(-1, 2 * shape.layers, shape.heads, shape.head_dim)
        return vectors.permute(1, 2, 0, 3)[:, None].expand(-1, rows, -1, -1, -1)


def add_prefix(model: nn.Module, prompt: SoftPrompt, shape: CacheShape) -> str:
    """Put a prefix (tokens, shape.size) on the model, in place; returns the prompt's path."""
    prefix = Prefix(prompt, shape)
    model.add_module(NAME, prefix.train(model.training))
    return f"{NAME}.prompt"


def find_prefix(model: nn.Module) -> Prefix | None:
    """The prefix on the model."""
    prefix = model._modules.get(NAME)
    return prefix if isinstance(prefix, Prefix) else None


def packed_prefix(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a forward over packed documents is given so that they see the model's prefix; nothing without one.

    Each document has to begin with placeholders (see `find_leading`): their keys and values are replaced by the
    prefix's in every layer, and what becomes of themselves is seen by no other token.
    """
    prefix = find_prefix(model)
    return {"prefix_states": prefix(1, model.dtype)} if prefix else {}


def prefix_arguments(model: PreTrainedModel, attention_mask: Tensor) -> dict[str, Any]:
    """What a forward or `generate` over padded rows is given so that they see the model's prefix; nothing without one.

    Args:
        attention_mask: (B, T) 1 for real tokens.

    Returns:
        `past_key_values`, for one use only, and the `attention_mask` (B, tokens + T). Gradients flow into the prefix.

    Raises:
        UsageError: the layers are checkpointed; run again for the gradient, they would find a cache that has grown.
    """
    prefix = find_prefix(model)
    if prefix is None:
        return {}
    if model.training and model.is_gradient_checkpointing:
        raise UsageError(
            "Prefix tuning with padded batches does not work with train.gradient_checkpointing; set it to false."
        )
    if hasattr(model.base_model, "rope_deltas"):
        # left by `generate`, Qwen-VL models would take the prefix for text that they have to place
        model.base_model.rope_deltas = None
    cache = _new_cache(model)
    parts = prefix(len(attention_mask), model.dtype)
    for layer in range(prefix.shape.layers):
        cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
    seen = attention_mask.new_ones(len(attention_mask), parts.shape[3])
    return {"past_key_values": cache, "attention_mask": torch.cat([seen, attention_mask], dim=1)}


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def measure_cache(model: PreTrainedModel) -> CacheShape:
    """What the model keeps, found by running it: configs tell it in too many ways.

    Raises:
        UsageError: its layers keep no keys and values, or differ from each other.
    """
    probe = torch.tensor([[1, 2, 3]], device=input_embedding(model).weight.device)
    cache = _new_cache(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.base_model(input_ids=probe, past_key_values=cache, use_cache=False)
    except TypeError as error:
        raise _unusable(model) from error
    finally:
        model.train(training)
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    shapes = {(tensor.shape[1], tensor.shape[3]) if tensor is not None else () for tensor in kept}
    if len(shapes) != 1 or not all(shapes):
        raise _unusable(model)
    return CacheShape(len(cache.layers), *shapes.pop())


def _unusable(model: nn.Module) -> UsageError:
    return UsageError(
        f"{type(model).__name__} does not keep keys and values alike in all its layers, which prefix tuning needs; use "
        "adapter.type prompt or ptuning."
    )
