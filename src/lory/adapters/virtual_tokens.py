"""Virtual tokens: a model's input embedding that has a few more rows, which are a soft prompt's vectors.

The id V + i, V being the rows of the embedding's own weight, stands for the prompt's vector i. So virtual tokens are
tokens: they can be part of any row, packed or padded, have positions, and nothing else of the model needs to know.
Only a decoder's processing of logits must not see them (see `lory.adapters.prompt.prompt_inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.adapters.encoders import SoftPrompt, find_soft_prompt
from lory.runtime import UsageError
from lory.types import IGNORE, Sample

NAME = "virtual_tokens"


class _WithVirtualTokens(nn.Module):
    """Mixin of an embedding that looks ids from V on up in its soft prompt."""

    def forward(self, input_ids: Tensor) -> Any:
        """(...) ids to (..., H)."""
        prompt = self.get_submodule(NAME)
        own = self.get_parameter("weight").shape[0]
        # without a look at the values, which would wait for a GPU
        rows = super().forward(input_ids.clamp(max=own - 1))
        vectors = F.embedding((input_ids - own).clamp(min=0), prompt())
        return torch.where((input_ids >= own)[..., None], vectors.to(rows.dtype), rows)


def add_virtual_tokens(model: nn.Module, prompt: SoftPrompt) -> str:
    """Put `prompt` (tokens, H) into the model's input embedding, in place; returns the prompt's path.

    The embedding's class becomes a subclass, so that its weight stays tied, named and placed as it was.
    """
    embedding = input_embedding(model)
    embedding.add_module(NAME, prompt)
    prompt.train(model.training)
    base = type(embedding)
    embedding.__class__ = type(base.__name__, (_WithVirtualTokens, base), {"__module__": base.__module__})
    return next(path for path, module in model.named_modules() if module is prompt)


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The model's input embedding.

    Raises:
        UsageError: it has none that ids are looked up in, or it has an encoder and a decoder.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        raise UsageError(f"{type(model).__name__} has no input embedding, which a soft prompt needs; use lora.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(f"{type(model).__name__} is an encoder with a decoder, which has no soft prompts; use lora.")
    return embedding


def virtual_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids of the model's virtual tokens; none where it has no prompt or a prefix."""
    prompt = find_soft_prompt(model)
    if prompt is None or prompt.config.type == "prefix":
        return ()
    first = input_embedding(model).weight.shape[0]
    return tuple(range(first, first + prompt.config.virtual_tokens))


@dataclass(frozen=True)
class Leading:
    """What every sample begins with in training."""

    ids: tuple[int, ...] = ()
    placeholders: bool = False
    """The ids stand for a prefix's tokens, which predict nothing; virtual tokens predict a text's first token."""

    def __len__(self) -> int:
        return len(self.ids)

    def prepend(self, sample: Sample) -> Sample:
        """The sample after these ids, none of which is learnt."""
        if not self.ids:
            return sample
        labels = (IGNORE, *sample.labels[1:]) if self.placeholders else sample.labels
        weights = None if sample.weights is None else (*[0.0] * len(self.ids), *sample.weights)
        return Sample((*self.ids, *sample.input_ids), (*[IGNORE] * len(self.ids), *labels), weights, sample.images)


def find_leading(model: nn.Module, packed: bool) -> Leading:
    """What the model's samples begin with: virtual tokens, a prefix's placeholders in packed rows, or nothing."""
    prompt = find_soft_prompt(model)
    if packed and prompt and prompt.config.type == "prefix":
        return Leading((0,) * prompt.config.virtual_tokens, placeholders=True)
    return Leading(virtual_ids(model))
