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
from torch.nn import functional as F

from lory.models.fused_attention import Attention, Seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Features = dict[str, Tensor]
"""What the tower gave for one image: `pooler_output`, (tokens, H) or (tiles, tokens, H), and where several layers of
the language model are fed, `deepstack_features` (layers, tokens, H). Beside them `image_grid_thw` (3) for positions."""

IMAGES_APART = "lory_flash_images"
"""What our attention of images is called. transformers gives an attention all images at once if its name has this word
in it: flash."""

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


def speed_up_tower(model: PreTrainedModel) -> bool:
    """On a CPU, let the tower do the same in less time; whether anything was changed.

    Where the tower takes images of any size (Qwen2-VL and its kin), all images of a batch are attended to in one call,
    short ones together; elsewhere by plain products: torch's fused attention takes twice as long for the few tokens of
    an image. Patches that come cut out already are multiplied, not convolved.
    """
    config = getattr(model.config, "vision_config", None)
    if model.device.type != "cpu" or config is None:
        return False
    towers = [child for child in model.base_model.children() if getattr(child, "config", None) is config]
    convolutions = [module for tower in towers for module in tower.modules() if _is_cut_out(module)]
    for convolution in convolutions:
        convolution.__class__ = _PatchProduct
    if config._attn_implementation != "sdpa":
        return bool(convolutions)
    takes_any_size = towers and all("grid_thw" in inspect.signature(type(t).forward).parameters for t in towers)
    if takes_any_size and not getattr(config, "attention_dropout", 0.0):
        from transformers import AttentionInterface

        AttentionInterface.register(IMAGES_APART, attend_images)
        # past set_attn_implementation, which for the word "flash" would look for the package of that name
        config._attn_implementation = IMAGES_APART
    else:
        model.set_attn_implementation({"vision_config": "eager"})
    return True


def _is_cut_out(module: nn.Module) -> bool:
    """Whether it is a convolution whose kernels lie side by side."""
    if type(module) is not nn.Conv3d or module.stride != module.kernel_size or module.groups != 1:
        return False
    return module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)


class _PatchProduct(nn.Conv3d):
    """A convolution that is a product of matrices where its input is as large as its kernel."""

    def forward(self, patches: Tensor) -> Tensor:
        if patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        product = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return product[:, :, None, None, None]


def attend_images(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of each patch to all of its image, on a CPU (transformers' attention interface).

    Args:
        query, key, value: (B, heads, T, head_dim); B is 1 where images come one after the other.
        cu_seq_lens_q: (images + 1) borders between these; None: each of the B is an image.

    Returns:
        (B, T, heads, head_dim).

    Raises:
        ValueError: a mask, dropout or another kind of attention is asked for, which these towers do not do.
    """
    given = {"attention_mask": attention_mask, "dropout": dropout or None} | unused
    refused = ("attention_mask", "dropout", "is_causal", "sliding_window", "softcap", "s_aux")
    if asked := [name for name in refused if given.get(name) is not None and given[name] is not False]:
        raise ValueError(f"{', '.join(asked)} was asked for; attention of images apart lets each patch see its image")
    batch, _, tokens, _ = query.shape
    borders = range(0, batch * tokens + 1, tokens) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (query, key, value))
    out: Tensor = Attention.apply(q, k, v, Seen(tuple(borders), scaling, causal=False))
    return out.view(batch, tokens, *out.shape[1:]), None
