"""Soft prompts as adapters: prompt tuning (Lester et al. 2021, arXiv 2104.08691), P-tuning and prefix tuning.

Nothing of the model is changed, so there is nothing to merge. On disk they are PEFT's, which stores the vectors only;
what a network that produces them learnt lies beside, in `ENCODER_FILE`, for training to go on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lory.adapters.encoders import PrefixEncoder, PromptConfig, PromptEncoder, SoftPrompt, find_soft_prompt
from lory.adapters.files import CONFIG_FILE, WEIGHTS_FILE, load_tensors, task_type
from lory.adapters.inject import Match, adapted_layers
from lory.adapters.prefix import CacheShape, add_prefix, find_prefix, measure_cache, prefix_arguments
from lory.adapters.virtual_tokens import add_virtual_tokens, input_embedding, virtual_ids
from lory.config import build
from lory.runtime import UsageError, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENCODER_FILE = "prompt_encoder.safetensors"
_VECTORS = "prompt_embeddings"
_PEFT_TYPES = {"prompt": "PROMPT_TUNING", "ptuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
_INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
# Keys of PEFT's config that are read, or say nothing about what the stored vectors mean
_KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "num_virtual_tokens", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    *("token_dim", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    *("prefix_projection", "init_weights"),
}


def attach(
    model: PreTrainedModel, config: PromptConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Match]:
    """Freeze `model` and put a soft prompt on it, in place; returns what is trained.

    Args:
        tokenizer: for the tokens of `config.init_text`.

    Raises:
        UsageError: the model cannot have this kind of prompt, or carries an adapter already.
    """
    prompt, shape = _new_prompt(model, config)
    if config.type == "prompt" and config.init != "random":
        _start_from_tokens(input_embedding(model), prompt, tokenizer)
    path = _put(model, prompt, shape)
    learnt = sum(parameter.numel() for parameter in prompt.parameters())
    return [Match(path, config.type, (config.virtual_tokens, prompt.size), 0, learnt)]


def _new_prompt(
    model: PreTrainedModel, config: PromptConfig, with_encoder: bool = True
) -> tuple[SoftPrompt, CacheShape | None]:
    embedding = input_embedding(model)
    if find_soft_prompt(model) or next(adapted_layers(model), None):
        raise UsageError("The model carries an adapter already; load the base model afresh.")
    shape = measure_cache(model) if config.type == "prefix" else None
    size = shape.size if shape else embedding.weight.shape[1]
    prompt: SoftPrompt
    if config.type == "ptuning" and with_encoder:
        prompt = PromptEncoder(config, size)
    elif shape and config.projection and with_encoder:
        prompt = PrefixEncoder(config, size, shape.token_dim)
    else:
        prompt = SoftPrompt(config, size)
    # fp32 or wider, whatever the model's own is
    dtype = torch.promote_types(embedding.weight.dtype, torch.float32)
    return prompt.to(embedding.weight.device, dtype), shape


def _put(model: PreTrainedModel, prompt: SoftPrompt, shape: CacheShape | None) -> str:
    model.requires_grad_(False)
    return add_prefix(model, prompt, shape) if shape else add_virtual_tokens(model, prompt)


@torch.no_grad()
def _start_from_tokens(embedding: nn.Embedding, prompt: SoftPrompt, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Start with the embeddings of random tokens, or of a text's, which are cut or repeated to fit."""
    length = prompt.config.virtual_tokens
    ids = torch.randint(embedding.weight.shape[0], (length,))
    if prompt.config.init_text is not None:
        if tokenizer is None:
            raise ValueError("init text needs a tokenizer")
        own = tokenizer(prompt.config.init_text)["input_ids"]
        ids = torch.tensor((own * length)[:length])
    # looked up, not copied: some embeddings scale their rows
    prompt.embedding.weight.copy_(embedding(ids.to(embedding.weight.device)))


def prompt_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """What `model.generate` is given to continue `input_ids` after the model's soft prompt, if it has one.

    The processing of logits sees `input_ids` alone, and they are what the returned sequences begin with.

    Args:
        input_ids: (B, T) without virtual tokens.
        attention_mask: (B, T) 1 for real tokens, which padding on the left precedes; by default all.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    inputs = {"input_ids": input_ids, "attention_mask": mask} | prefix_arguments(model, mask)
    if ids := virtual_ids(model):
        before = torch.tensor(ids, device=input_ids.device).expand(len(input_ids), -1)
        inputs["inputs_embeds"] = model.get_input_embeddings()(torch.cat([before, input_ids], dim=1))
        inputs["attention_mask"] = torch.cat([torch.ones_like(before), mask], dim=1)
    return inputs


def virtual_length(model: nn.Module) -> int:
    """How many tokens of the model's context its soft prompt takes."""
    prompt = find_soft_prompt(model)
    return prompt.config.virtual_tokens if prompt else 0


def save(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the model's soft prompt into an existing folder, as PEFT would.

    Args:
        base: what `base_model_name_or_path` says: where the base model is to be found.
    """
    prompt = _own_prompt(model)
    with torch.no_grad():
        vectors = prompt().detach().cpu().contiguous()
    save_file({_VECTORS: vectors}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if prompt.has_encoder:
        state = {name: value.detach().cpu().contiguous() for name, value in prompt.state_dict().items()}
        save_file(state, folder / ENCODER_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, _describe(model, prompt, base))


def _own_prompt(model: nn.Module) -> SoftPrompt:
    prompt = find_soft_prompt(model)
    if prompt is None:
        raise ValueError("this model has no soft prompt")
    return prompt


def _describe(model: PreTrainedModel, prompt: SoftPrompt, base: str) -> dict[str, Any]:
    config, prefix = prompt.config, find_prefix(model)
    text = model.config.get_text_config()
    described = {
        "peft_type": _PEFT_TYPES[config.type],
        # without a task, PEFT leaves the prompt out of its forward
        "task_type": task_type(model) or "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "num_virtual_tokens": config.virtual_tokens,
        "num_transformer_submodules": 1,
        "token_dim": prefix.shape.token_dim if prefix else prompt.size,
        "num_layers": prefix.shape.layers if prefix else text.num_hidden_layers,
        # only a prefix has use for them, but PEFT wants a number
        "num_attention_heads": prefix.shape.heads if prefix else getattr(text, "num_attention_heads", 1),
        "modules_to_save": None,
        "inference_mode": True,
    }
    if config.type == "prompt":
        described |= {
            "prompt_tuning_init": _INITS[config.init],
            "prompt_tuning_init_text": config.init_text,
            "tokenizer_name_or_path": base if config.init_text else None,
            "tokenizer_kwargs": None,
        }
    elif config.type == "ptuning":
        described |= {
            "encoder_reparameterization_type": config.encoder.upper(),
            "encoder_hidden_size": config.encoder_hidden_size or prompt.size,
            "encoder_num_layers": config.encoder_layers,
            "encoder_dropout": config.encoder_dropout,
        }
    else:
        width = config.encoder_hidden_size or described["token_dim"]
        described |= {"prefix_projection": config.projection, "encoder_hidden_size": width, "init_weights": None}
    return described


def is_soft_prompt(folder: Path) -> bool:
    """Whether the adapter in `folder` is a soft prompt."""
    config = read_json(folder / CONFIG_FILE)
    return isinstance(config, dict) and config.get("peft_type") in _PEFT_TYPES.values()


def check_mergeable(folder: Path) -> None:
    """Raise a `UsageError` when the adapter in `folder` is a soft prompt."""
    if is_soft_prompt(folder):
        raise UsageError(
            f"{folder} is a soft prompt, which changes no weights of its model, so it cannot be merged; use it as an "
            "adapter."
        )


def read_config(folder: Path) -> PromptConfig:
    """The settings in PEFT's adapter_config.json, refused when it asks for something that would be left out.

    Raises:
        UsageError: it is another kind of adapter, or has something that is not known here.
    """
    path = folder / CONFIG_FILE
    if not is_soft_prompt(folder):
        raise UsageError(f"{path} is not a soft prompt's; its peft_type should be one of {[*_PEFT_TYPES.values()]}.")
    config = read_json(path)
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False, "", [], {}):
            raise UsageError(f"{path} sets {key}={value!r}, which lory does not read.")
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise UsageError(f"{folder} is for an encoder with a decoder, which lory has no soft prompts for.")
    if not isinstance(config.get("num_virtual_tokens"), int):
        raise UsageError(f"{path} has no 'num_virtual_tokens'.")
    kind = next(kind for kind, name in _PEFT_TYPES.items() if name == config["peft_type"])
    values: dict[str, Any] = {"type": kind, "virtual_tokens": config["num_virtual_tokens"]}
    if kind == "prompt":
        text, start = config.get("prompt_tuning_init_text"), config.get("prompt_tuning_init")
        values["init"] = "vocabulary" if start == "SAMPLE_VOCAB" else "random"
        values |= {"init": "text", "init_text": text} if start == "TEXT" and text else {}
    else:
        values["encoder_hidden_size"] = config.get("encoder_hidden_size")
    if kind == "ptuning":
        values["encoder"] = str(config.get("encoder_reparameterization_type") or "MLP").lower()
        values["encoder_layers"] = config.get("encoder_num_layers") or 2
        values["encoder_dropout"] = config.get("encoder_dropout") or 0.0
    elif kind == "prefix":
        values["projection"] = bool(config.get("prefix_projection"))
    return build(PromptConfig, values, str(path))


def load(model: PreTrainedModel, folder: Path, trainable: bool = False) -> None:
    """Put the soft prompt in `folder` on `model`, in place.

    Args:
        trainable: bring the network that produces the vectors, too, and let it learn on.

    Raises:
        UsageError: it was made for another model, or what should be trained is not there.
    """
    config = read_config(folder)
    prompt, shape = _new_prompt(model, config, with_encoder=trainable)
    _fill(prompt, folder)
    _put(model, prompt, shape)
    prompt.requires_grad_(trainable)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Set what `attach` put on `model` to what was stored, to go on training.

    Raises:
        UsageError: what was stored is another kind of prompt, or of other sizes.
    """
    prompt = _own_prompt(model)
    stored, own = read_config(folder), prompt.config
    if (stored.type, stored.virtual_tokens, stored.projection) != (own.type, own.virtual_tokens, own.projection):
        raise UsageError(f"{folder} holds another soft prompt than this config asks for; resume its own run.")
    _fill(prompt, folder)


@torch.no_grad()
def _fill(prompt: SoftPrompt, folder: Path) -> None:
    """Copy what is stored in `folder` into `prompt`: the network's state where it has one, else the vectors."""
    if prompt.has_encoder:
        if not (folder / ENCODER_FILE).exists():
            raise UsageError(
                f"{folder} has no {ENCODER_FILE}, the network that produced its vectors (PEFT does not store it), so "
                "it cannot be trained any further; start a new run."
            )
        tensors = load_tensors(folder / ENCODER_FILE)
    else:
        tensors = load_tensors(folder / WEIGHTS_FILE)
        if tensors.keys() != {_VECTORS}:
            raise UsageError(f"{folder / WEIGHTS_FILE} should hold '{_VECTORS}' alone, and has {sorted(tensors)}.")
        tensors = {"embedding.weight": tensors[_VECTORS]}
    own = prompt.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != found:
        name = next(name for name in [*shapes, *found] if shapes.get(name) != found.get(name))
        raise UsageError(
            f"{folder} has {found.get(name, 'nothing')} for '{name}' of the soft prompt, and {shapes.get(name)} is "
            "expected; it was made for another model or config."
        )
    prompt.load_state_dict(tensors)
