"""A look before training: the samples with the learnt tokens in colour, the counts, and the memory it will take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from lory.adapters import kinds
from lory.losses.cross_entropy import CHUNK_TOKENS
from lory.models.load import choose_dtype, default_device, load_config
from lory.models.quantize import count_bytes, stored_quantization
from lory.runtime import UsageError
from lory.types import IGNORE, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lory.training.run import Prepared

LEARNT = "bold green"
CONTEXT = "dim"


def show_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The sample's text, learnt tokens in colour and between ⟦ ⟧, so that it reads without colour, too."""
    text = Text()
    for run, learnt in _runs(sample):
        words = tokenizer.decode(run)
        text.append(f"⟦{words}⟧" if learnt else words, style=LEARNT if learnt else CONTEXT)
    return text


def _runs(sample: Sample) -> list[tuple[list[int], bool]]:
    """Stretches of tokens that are all learnt or all not.

    (Decoded together: a character may be spread over several tokens.)
    """
    runs: list[tuple[list[int], bool]] = []
    for position, (token, label) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
        learnt = label != IGNORE and position > 0
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(token)
    return runs


def describe_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The sample for --json: tokens, labels and both as text."""
    # as in `Sample.supervised`, the first token has nothing before it to be predicted from
    learnt = [label for label in sample.labels[1:] if label != IGNORE]
    return {
        "input_ids": list(sample.input_ids),
        "labels": list(sample.labels),
        "text": tokenizer.decode(list(sample.input_ids)),
        "learnt_text": tokenizer.decode(learnt),
    }


def estimate_memory(prepared: Prepared, rows: Sequence[Sequence[int]]) -> dict[str, int]:
    """Bytes that training will take, by what takes them; weights are counted exactly, activations roughly.

    A token of a layer leaves about 16 H + 5 I numbers for the backward pass (H the hidden size, I the MLP's): inputs
    of norms, projections, rotations and attention, and the MLP's gate, up, activation and product. With gradient
    checkpointing it is the layer's input alone, and one layer at a time in full.

    Raises:
        UsageError: the model is no causal language model, or lacks the layers that are to be adapted.
    """
    from transformers import AutoModelForCausalLM

    config = prepared.config
    device = default_device()
    dtype = choose_dtype(config.model.dtype, device)
    path, trust = prepared.resolved.base_path, config.model.trust_remote_code
    shape = load_config(path, trust)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=trust)
    except ValueError as error:
        raise UsageError(f"{path} is no causal language model: {str(error).splitlines()[0]}") from error
    base_bytes = count_bytes(model, dtype, config.model.quantize or stored_quantization(shape))
    with torch.device("meta"):
        matches = kinds.attach(model, config.adapter, prepared.tokenizer)
    text = shape.get_text_config()
    trained = sum(match.parameters for match in matches)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    in_full = 16 * hidden + 5 * (getattr(text, "intermediate_size", None) or 4 * hidden)
    per_token = layers * hidden + in_full if config.train.gradient_checkpointing else layers * in_full
    samples = prepared.dataset.train
    lengths = sorted((sum(len(samples[i]) for i in row) for row in rows), reverse=True)
    tokens = sum(lengths[: config.train.batch_size])
    # the gradient and AdamW's two moments in fp32, and the adapter's own weights, where these are not the base's
    trained_bytes = trained * 4 * (3 if config.adapter.type in ("full", "freeze") else 4)
    parts = {
        "base_weights": base_bytes,
        "adapter_and_optimizer": trained_bytes,
        "activations": tokens * per_token * dtype.itemsize,
        # logits, their softmax and gradient, in fp32
        "logits": CHUNK_TOKENS * text.vocab_size * 4 * 3,
    }
    return {**parts, "total": sum(parts.values())}
