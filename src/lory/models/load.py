"""Loading a model that writes text and its tokenizer, with the errors a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lory.architectures import find_model_class, is_vision_config
from lory.config import Section
from lory.models.quantize import Quantization, prepare_for_training, quantized_arguments
from lory.models.resolve import Resolved
from lory.models.vision import PROCESSOR_FILES, build_processor, has_processor
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """The base model."""

    path: str = Field("smollm2", description="A model folder, a hub id, or smollm2.")
    dtype: DtypeName = Field(
        "auto", description="Precision of the base weights; auto is float32 on a CPU, bfloat16 on a GPU that has it."
    )
    quantize: Quantization | None = Field(
        None,
        description="Hold the base's linear layers in few bits: nf4 (about 6 bits: NF4 where a layer widens, else "
        "int8), nf4-pure (4.1 bits) or int8; what is trained on top stays in higher precision. Needs bitsandbytes.",
    )
    fp8: bool = Field(
        False,
        description="Hold and multiply the base's frozen linear layers in FP8 while training; needs an NVIDIA GPU from "
        "Hopper on (compute capability 9.0).",
    )
    template: str = Field(
        "auto",
        description="The chat template: auto (the tokenizer's own), a bundled one's name, or a .jinja file's path; it "
        "is saved with every checkpoint.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model: only if you read it."
    )


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator
    return torch.device("cpu")


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The torch dtype for a config's name; `auto` is the widest that is fast on the device."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def load_model(
    resolved: Resolved,
    dtype: DtypeName = "auto",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    quantize: Quantization | None = None,
) -> PreTrainedModel:
    """The base model of `resolved` on `device`, in eval mode, without its adapter; one that sees with its tower.

    Args:
        dtype: precision of the weights, or of those that are not quantized.
        quantize: hold the linear layers in few bits; a folder that is quantized already is loaded as it is.

    Raises:
        UsageError: the folder is not a causal language model that transformers knows, or its files are broken.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    device = device or default_device()
    path = resolved.base_path
    config = load_config(path, trust_remote_code)
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"{path} has no .safetensors weights; pickled ones (.bin) are not read: convert them first.")
    precision = choose_dtype(dtype, device)
    few_bits = quantized_arguments(config, quantize, precision, device)
    # transformers up to 5.17 runs such a model under sdpa, which leaves the cap out without a word
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    attention = {"attn_implementation": "eager"} if capped else {}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = find_model_class(config).from_pretrained(
            path,
            config=config,
            dtype=precision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **attention,
            **few_bits,
        )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{path} could not be loaded as a causal language model: {first_line(error)}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"{path} lacks {len(missing)} of the model's weights, {missing[0]} among them.")
    return prepare_for_training(model).eval() if few_bits else model.to(device).eval()


def load_tokenizer(resolved: Resolved, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the adapter, else the base model's."""
    from transformers import AutoTokenizer

    path = resolved.tokenizer_path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UsageError(f"The tokenizer in {path} could not be loaded: {first_line(error)}") from error


def load_processor(
    resolved: Resolved, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> ProcessorMixin | None:
    """The processor that turns images and text into what the model is fed; None for a model that reads text only.

    It is the one in `find_processor_folder`, around `tokenizer`, which gets its chat template if it has none itself.
    Images are handled by Pillow, whether torchvision is there or not, so that they give the same pixels everywhere.

    Raises:
        UsageError: the model sees, but its processor's files are missing or broken.
    """
    config = load_config(resolved.base_path, trust_remote_code)
    if not is_vision_config(config):
        return None
    path = find_processor_folder(resolved)
    try:
        processor = build_processor(path, config, tokenizer)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UsageError(f"The image processor in {path} could not be loaded: {first_line(error)}") from error
    template = getattr(processor, "chat_template", None)
    if not tokenizer.chat_template and isinstance(template, str):
        tokenizer.chat_template = template
    return processor


def find_processor_folder(resolved: Resolved) -> Path:
    """Where the model's processor is: saved with the adapter, else with the base.

    Raises:
        UsageError: in neither.
    """
    for folder in (resolved.tokenizer_path, resolved.base_path):
        if has_processor(folder):
            return folder
    raise UsageError(
        f"{resolved.base_path} is a model that sees, but has no {' or '.join(PROCESSOR_FILES)}, which says how images "
        "are prepared; fetch the model again."
    )


def load_config(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config.json of a model's folder.

    Raises:
        UsageError: there is none, or it is of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    if not (path / "config.json").exists():
        raise UsageError(f"{path} has no config.json; it is not a model folder.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"{path / 'config.json'} could not be read: {first_line(error)}") from error


def load_generation_config(resolved: Resolved, trust_remote_code: bool = False) -> GenerationConfig:
    """What the model's folder says of decoding; without generation_config.json, what its config.json implies."""
    from transformers import GenerationConfig

    if (resolved.base_path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(resolved.base_path)
    return GenerationConfig.from_model_config(load_config(resolved.base_path, trust_remote_code))


def terminators(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that end an answer: the model's own list, and the tokenizer's end of sequence."""
    configured = generation_config.eos_token_id if generation_config else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise UsageError(f"{tokenizer.name_or_path} names no end-of-sequence token, so an answer could never end.")
    return tuple(ids)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
