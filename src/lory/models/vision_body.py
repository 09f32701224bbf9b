"""The body of a model that sees, in training: images through the tower once, tokens document by document.

transformers' models take what their tower gave (``mm_encoder_outputs``) in place of pixels. So the tower runs apart
from the language model: under its own attention, for all documents together, or not at all where its output is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Features = dict[str, Tensor]
"""What the tower gave for one image: `pooler_output`, (tokens, H) or (tiles, tokens, H), and where several layers of
the language model are fed, `deepstack_features` (layers, tokens, H). Beside them `image_grid_thw` (3) for positions."""

GRID = "image_grid_thw"
_POOLED, _DEEP = "pooler_output", "deepstack_features"


class VisionBody:
    """A model's body and its tower.

    Attributes:
        image_token: the id of the token that stands for a part of an image.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.body = model, model.base_model
        self.image_token = int(getattr(model.config, "image_token_id", -1))
        self.has_grid_positions = hasattr(self.body, "get_rope_index")

    def encode(self, pixels: Mapping[str, Tensor]) -> Any:
        """The tower's output for images, as the model's forward takes it; differentiable where the tower is trained."""
        return self.body.get_image_features(**{name: self.place(value) for name, value in pixels.items()})

    def place(self, value: Tensor) -> Tensor:
        """A tensor of the processor's on the model's device, pixels in its precision."""
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

    def split(self, output: Any, pixels: Mapping[str, Tensor], images: int) -> list[Features] | None:
        """The output for `images` images, image by image; None where it does not tell them apart."""
        pooled = output.pooler_output
        if isinstance(pooled, Tensor):
            if images != 1:
                return None
            parts = [pooled]
        elif len(pooled) == images:
            parts = list(pooled)
        else:
            return None
        found: list[Features] = [{_POOLED: part.detach()} for part in parts]
        if (deep := getattr(output, _DEEP, None)) is not None:
            # for each layer that is fed, a part for each image
            for number, features in enumerate(found):
                features[_DEEP] = torch.stack([layer[number].detach() for layer in deep])
        if GRID in pixels:
            for features, grid in zip(found, pixels[GRID], strict=True):
                features[GRID] = grid
        return found

    def join(self, features: Sequence[Features]) -> Any:
        """What `encode` would have given for these images together."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        dtype, device = self.model.dtype, self.model.device
        pooled: Any = [image[_POOLED].to(device, dtype) for image in features]
        output = BaseModelOutputWithPooling(pooler_output=pooled)
        if pooled[0].dim() > 2:
            output.pooler_output = torch.cat(pooled)
        if _DEEP in features[0]:
            layers = zip(*(image[_DEEP].to(device, dtype) for image in features), strict=True)
            output.deepstack_features = list(layers)
        return output

    def positions(self, documents: Sequence[Tensor], grids: Sequence[Tensor]) -> list[Tensor] | None:
        """(3, t) positions of each document's tokens, as the model gives them to one alone; None: the usual ones.

        Args:
            documents: (t) token ids of each.
            grids: (images, 3) of each document's images.
        """
        if not self.has_grid_positions:
            return None
        found = []
        for ids, grid in zip(documents, grids, strict=True):
            if not len(grid):
                found.append(torch.arange(len(ids)).expand(3, -1))
                continue
            kinds = (ids == self.image_token).int()
            positions, _ = self.body.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)
            found.append(positions[:, 0])
        return found

    def __call__(self, output: Any, **inputs: Any) -> Tensor:
        """(B, T, H) last hidden states of tokens with the tower's `output` (None: no images) in their places."""
        encoded = {} if output is None else {"mm_encoder_outputs": {"image": output}}
        # a cache would make the model forget where documents begin
        hidden: Tensor = self.body(**inputs, **encoded, use_cache=False).last_hidden_state
        return hidden


def explain_apart(model: PreTrainedModel) -> str:
    """Why the model's tower cannot run apart from its language model, as a clause; empty if it can."""
    body = model.base_model
    if "mm_encoder_outputs" not in inspect.signature(type(body).forward).parameters:
        return f"{type(model).__name__} does not take its tower's output in place of pixels"
    if not hasattr(body, "get_image_features"):
        return f"{type(model).__name__} has no tower that can be run alone"
    return ""


def tower_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """All parameters that belong to neither the language model nor its head: tower and projector, by name."""
    language = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]
    inside = {id(parameter) for module in language if module is not None for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}


def prefer_plain_attention(model: PreTrainedModel) -> bool:
    """On a CPU, let the tower attend by plain products; whether that was changed.

    torch's fused attention takes twice as long there for the few tokens of an image.
    """
    tower = getattr(model.config, "vision_config", None)
    if model.device.type != "cpu" or tower is None or tower._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation({"vision_config": "eager"})
    return True
