"""Tiny random models that see, of several families, saved with processors that need no torchvision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.sizes import TINY

TEXT = TINY | {"vocab_size": 340}
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_PART = "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}" + _PART + "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def draw(number: int, height: int = 20, width: int = 30) -> Any:
    """A picture of coloured noise, the same for the same number."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.RandomState(number).randint(0, 255, (height, width, 3), dtype=np.uint8))


def make_tokenizer(folder: Path, marks: tuple[str, ...], image: str, **settings: Any) -> Any:
    """The tests' small tokenizer with `marks` added and a template that writes `image` for each image."""
    from tests.conftest import make_tokenizer as make_plain
    from transformers import AutoTokenizer

    make_plain(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = TEMPLATE.replace("{{ IMAGE }}", image)
    tokenizer.save_pretrained(folder)
    if settings:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def save(folder: Path, model_class: Any, config: Any, processor: dict[str, Any], images: dict[str, Any]) -> None:
    """A model with large random weights, and its processor's files."""
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config.eos_token_id = 2
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}


def save_qwen(folder: Path, family: str, vision: dict[str, Any], **text: Any) -> None:
    """A Qwen-VL model: patches of 4 x 4 pixels, 2 x 2 of which make a token."""
    import transformers as hf

    tokenizer = make_tokenizer(folder, MARKS, "<|vision_start|><|image_pad|><|vision_end|>")
    ids = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    config = getattr(hf, f"{family}Config")(
        text_config=TEXT | {"rope_parameters": MROPE} | text,
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 4} | vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model_class = getattr(hf, f"{family}ForConditionalGeneration")
    save(folder, model_class, config, {"processor_class": f"{family}Processor"}, QWEN_IMAGES)


_TOWER = {"hidden_size": 16, "out_hidden_size": 24, "intermediate_size": 32}
# of towers whose settings are called as CLIP's are
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def make_qwen2_vl(folder: Path, **changes: Any) -> None:
    """Qwen2-VL."""
    save_qwen(folder, "Qwen2VL", {"embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2}, **changes)


def make_qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL, whose tower attends in windows."""
    save_qwen(folder, "Qwen2_5_VL", _TOWER | {"window_size": 16, "fullatt_block_indexes": [1]})


def make_qwen3_vl(folder: Path) -> None:
    """Qwen3-VL, whose tower feeds several layers of the language model."""
    save_qwen(folder, "Qwen3VL", _TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]})


def make_glm4v(folder: Path) -> None:
    """GLM-4V."""
    import transformers as hf

    marks = (
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|image|>",
        "<|video|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    )
    tokenizer = make_tokenizer(folder, marks, "<|begin_of_image|><|image|><|end_of_image|>")
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks)), strict=True))
    config = hf.Glm4vConfig(
        text_config=TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 24,
            "num_heads": 2,
            "intermediate_size": 32,
            "patch_size": 4,
            "image_size": 32,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    images = QWEN_IMAGES | {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 128, "longest_edge": 2048},
    }
    save(folder, hf.Glm4vForConditionalGeneration, config, {"processor_class": "Glm4vProcessor"}, images)


def make_llava(folder: Path) -> None:
    """LLaVA: a CLIP tower of fixed size, of which 16 tokens come."""
    import transformers as hf

    tokenizer = make_tokenizer(folder, ("<image>",), "<image>")
    config = hf.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=_CLIP | {"model_type": "clip_vision_model", "projection_dim": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    size = {"height": 16, "width": 16}
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": size}
    save(folder, hf.LlavaForConditionalGeneration, config, processor, images)


def make_internvl(folder: Path) -> None:
    """InternVL: up to two tiles and a thumbnail an image, of 4 tokens each."""
    import transformers as hf

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(folder, tuple(names.values()), "<IMG_CONTEXT>\\n", extra_special_tokens=names)
    config = hf.InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=_CLIP | {"image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 16, "width": 16},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 2,
    }
    save(
        folder,
        hf.InternVLForConditionalGeneration,
        config,
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        images,
    )


def make_smolvlm(folder: Path) -> None:
    """SmolVLM's architecture with Idefics3's processor class (SmolVLM's own wants num2words)."""
    import transformers as hf

    marks = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
    tokenizer = make_tokenizer(folder, marks, "<image>")
    config = hf.SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=dict(_CLIP),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
    }
    save(
        folder,
        hf.SmolVLMForConditionalGeneration,
        config,
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        images,
    )


def make_gemma3(folder: Path) -> None:
    """Gemma 3, in which the tokens of an image see each other."""
    import transformers as hf

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(folder, tuple(names.values()), "<start_of_image>", extra_special_tokens=names)
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in names.items()}
    config = hf.Gemma3Config(
        text_config=TEXT,
        vision_config=dict(_CLIP),
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_id=ids["image_token"],
        image_token_index=ids["image_token"],
    )
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}}
    save(
        folder,
        hf.Gemma3ForConditionalGeneration,
        config,
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        images,
    )


FAMILIES: dict[str, Callable[[Path], None]] = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "glm4v": make_glm4v,
    "llava": make_llava,
    "internvl": make_internvl,
    "smolvlm": make_smolvlm,
}
SERVED = FAMILIES | {"gemma3": make_gemma3}
"""With those that are chatted with and not trained."""
