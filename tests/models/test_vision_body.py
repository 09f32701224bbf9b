"""A tower that was sped up for a CPU gives what transformers' own gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vision_models import FAMILIES, draw
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from lory.assistant import load
from lory.models.vision_body import IMAGES_APART, attend_images, speed_up_tower

VisionModel = Callable[[str], Path]
OF_ANY_SIZE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
SIZES = [(20, 30), (60, 90), (150, 40), (20, 30), (90, 90)]


def encode(model: Any, pixels: dict[str, Tensor]) -> list[Tensor]:
    """What the tower gives for images, and the gradients of all its parameters."""
    model.zero_grad()
    pooled = model.base_model.get_image_features(**pixels).pooler_output
    features = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
    features.square().sum().backward()
    return [features.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_features_and_gradients_are_the_same(
    family: str, vision_model: VisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = load(vision_model(family), device="cpu")
    model = assistant.model.double()
    # several sizes at once, short enough to go together and too long for that
    pictures = [draw(number, *size) for number, size in enumerate(SIZES)]
    pixels = dict(assistant.reader.processor.image_processor(pictures, return_tensors="pt"))
    pixels = {name: x.double() if x.is_floating_point() else x for name, x in pixels.items()}
    expected = encode(model, pixels)
    assert speed_up_tower(model)
    used = model.config.vision_config._attn_implementation
    assert used == (IMAGES_APART if family in OF_ANY_SIZE else "eager")
    given: list[Any] = []

    def note(*inputs: Any, cu_seq_lens_q: Any = None, **named: Any) -> Any:
        given.append(cu_seq_lens_q)
        return attend_images(*inputs, cu_seq_lens_q=cu_seq_lens_q, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, IMAGES_APART, note)
    found = encode(model, pixels)
    if used == IMAGES_APART:
        # in one call a layer, not one for each image
        assert given
        assert all(len(borders) > len(SIZES) for borders in given)
    # transformers' plain attention has its softmax in fp32
    limits = {} if used == IMAGES_APART else {"rtol": 1e-4, "atol": 1e-5}
    assert len(found) == len(expected) > 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **limits)


def test_only_patches_that_are_cut_out_are_multiplied(vision_model: VisionModel) -> None:
    model = load(vision_model("qwen2_vl"), device="cpu").model
    plain = next(module for module in model.modules() if isinstance(module, nn.Conv3d))
    frames, height, width = plain.kernel_size
    patches = torch.randn(5, plain.in_channels, frames, height, width)
    larger = torch.randn(2, plain.in_channels, frames, 2 * height, 3 * width)
    expected = [plain(patches), plain(larger)]
    names = list(model.state_dict())
    assert speed_up_tower(model)
    with pytest.MonkeyPatch.context() as patch:
        # the ordinary way is gone: what is cut out does not need it
        patch.setattr(nn.Conv3d, "_conv_forward", None)
        torch.testing.assert_close(plain(patches), expected[0])
    torch.testing.assert_close([plain(patches), plain(larger)], expected)
    assert list(model.state_dict()) == names


def test_without_borders_each_row_is_an_image() -> None:
    q, k, v = (torch.randn(3, 4, 70, 8, dtype=torch.float64) for _ in range(3))
    found, _ = attend_images(nn.Identity(), q, k, v, None, scaling=0.3)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2))


def test_a_mask_is_refused() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="attention_mask was asked for"):
        attend_images(nn.Identity(), q, q, q, torch.ones(1, 1, 3, 3), scaling=1.0)


def test_a_tower_with_dropout_keeps_to_plain_attention(vision_model: VisionModel) -> None:
    model = load(vision_model("glm4v"), device="cpu").model
    model.config.vision_config.attention_dropout = 0.1
    assert speed_up_tower(model)
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize("asked", [{"is_causal": True}, {"sliding_window": 4}, {"softcap": 9.0}, {"dropout": 0.1}])
def test_another_kind_of_attention_is_refused(asked: dict[str, Any]) -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"{next(iter(asked))} was asked for"):
        attend_images(nn.Identity(), q, q, q, None, scaling=1.0, **asked)


def test_a_convolution_with_margins_stays_one(vision_model: VisionModel) -> None:
    model = load(vision_model("qwen2_vl"), device="cpu").model
    plain = next(module for module in model.modules() if isinstance(module, nn.Conv3d))
    plain.padding = (0, 1, 1)
    speed_up_tower(model)
    assert type(plain) is nn.Conv3d
