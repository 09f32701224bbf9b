"""A look before training: the samples with the learnt tokens in colour, the counts, and the memory it will take."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from lory.adapters import kinds
from lory.architectures import find_model_class
from lory.data.encoding.store import digest_conversation
from lory.data.mixture.dataset import DataConfig, Dataset
from lory.data.sources.read import open_source
from lory.losses.cross_entropy import CHUNK_TOKENS
from lory.models.load import choose_dtype, default_device, load_config
from lory.models.quantize import count_bytes, stored_quantization
from lory.runtime import UsageError
from lory.types import IGNORE, Conversation, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lory.training.run import Prepared

LEARNT = "bold green"
CONTEXT = "dim"
SHORT = 200
"""Characters of a message that is shortened."""
_REPEATED = re.compile(r"(<[^<>\s]{2,40}>)\1{3,}")
"""The placeholders of an image."""


def show_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The sample's text, learnt tokens in colour and between ⟦ ⟧, so that it reads without colour, too.

    A weight that is not 1 stands behind them, as in ⟦Yes.⟧×0.5.
    """
    text = Text()
    for run, weight in _runs(sample):
        words = _REPEATED.sub(_count_repeated, tokenizer.decode(run))
        text.append(_mark(words, weight) if weight else words, style=LEARNT if weight else CONTEXT)
    return text


def _count_repeated(match: re.Match[str]) -> str:
    return f"{match[1]}×{len(match[0]) // len(match[1])}"


def _mark(words: str, weight: float) -> str:
    return f"⟦{words}⟧" if weight == 1 else f"⟦{words}⟧×{weight:g}"


def show_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The sample's tokens with │ between them, coloured and marked as in `show_sample`; a line break is shown as ↵."""
    pieces = iter(split_tokens(sample.input_ids, tokenizer))
    text = Text()
    for run, weight in _runs(sample):
        words = "│".join(itertools.islice(pieces, len(run))).replace("\n", "↵")
        text.append("│" if text else "", style=CONTEXT)
        text.append(_mark(words, weight) if weight else words, style=LEARNT if weight else CONTEXT)
    return text


def split_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; where several tokens make one character, the last has it and the others are empty."""
    pieces: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        words = str(tokenizer.decode(waiting))
        # UTF-8 has at most four bytes a character
        whole = not words.endswith("\ufffd") or len(waiting) == 4
        pieces.append(words if whole else "")
        waiting = [] if whole else waiting
    return pieces


def _weigh_tokens(sample: Sample) -> list[float]:
    """How much each token counts in the loss; the first has nothing before it to be predicted from."""
    weights = sample.weights or (1.0,) * len(sample)
    learnt = [0.0 if label == IGNORE else weight for label, weight in zip(sample.labels, weights, strict=True)]
    return [0.0, *learnt[1:]]


def _runs(sample: Sample) -> list[tuple[list[int], float]]:
    """Stretches of tokens that count the same in the loss.

    (Decoded together: a character may be spread over several tokens.)
    """
    counted = zip(sample.input_ids, _weigh_tokens(sample), strict=True)
    groups = itertools.groupby(counted, key=lambda pair: pair[1])
    return [([token for token, _ in group], weight) for weight, group in groups]


def describe_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The sample for --json: tokens, labels and both as text; weights where they are not all 1."""
    # as in `Sample.supervised`, the first token has nothing before it to be predicted from
    learnt = [label for label in sample.labels[1:] if label != IGNORE]
    return {
        "input_ids": list(sample.input_ids),
        "labels": list(sample.labels),
        **({"weights": list(sample.weights)} if sample.weights else {}),
        "tokens": split_tokens(sample.input_ids, tokenizer),
        "text": tokenizer.decode(list(sample.input_ids)),
        "learnt_text": tokenizer.decode(learnt),
    }


def pick_samples(dataset: Dataset, count: int, each_source: bool) -> list[int]:
    """Numbers of the first training samples: in all, or of each source that has any."""
    if not each_source:
        return list(range(min(count, len(dataset.train))))
    sources = dataset.train.sources
    return [
        int(index) for number in sorted(set(sources.tolist())) for index in (sources == number).nonzero()[0][:count]
    ]


def find_conversations(dataset: Dataset, config: DataConfig, indices: Sequence[int]) -> list[Conversation]:
    """The conversations that training samples were made from, read again from their sources."""
    train = dataset.train
    wanted: list[tuple[int, bytes]] = []
    for index in indices:
        source, sample = train.identity(index)
        store = train.stores[source]
        number = int(((store.first <= sample) & (sample < store.first + store.count)).argmax())
        # a stream has one store for all of its sources
        wanted.append((-1 if dataset.stream else source, store.digests[number].tobytes()))
    found: dict[tuple[int, bytes], Conversation] = {}
    for place, source_config in enumerate(config.train):
        owner = -1 if dataset.stream else place
        missing = {key for key in wanted if key[0] == owner} - found.keys()
        reader = iter(open_source(source_config)) if missing else iter(())
        while missing and (conversation := next(reader, None)) is not None:
            key = (owner, digest_conversation(conversation))
            if key in missing:
                missing.discard(key)
                found[key] = conversation
    return [found[key] for key in wanted]


def describe_messages(conversation: Conversation, short: bool = False) -> dict[str, Any]:
    """The conversation for --json: its messages as OpenAI's API has them, or its text."""
    if conversation.text is not None:
        return {"source_text": _cut(conversation.text, short)}
    messages = []
    for message in conversation.messages:
        weight = {} if message.weight is None else {"weight": message.weight}
        media = {"media": [media.kind for media in message.media]} if message.media else {}
        plain = replace(message, content=_cut(message.content, short), media=())
        messages.append({**plain.to_dict(), **media, **weight})
    return {"messages": messages, **({"tools": json.loads(conversation.tools)} if conversation.tools else {})}


def show_messages(conversation: Conversation, short: bool = False) -> Text:
    """Each message as ``role: content``."""
    text = Text()
    if conversation.text is not None:
        return text.append(_cut(conversation.text, short))
    for number, message in enumerate(conversation.messages):
        line_break = "\n" if number else ""
        weight = "" if message.weight is None else f" (weight {message.weight:g})"
        text.append(f"{line_break}{message.role}{weight}: ", style="bold")
        thought = f"<think>{_cut(message.reasoning, short)}</think>\n" if message.reasoning else ""
        calls = "".join(f"\ncalls {call.name}({call.arguments})" for call in message.tool_calls)
        text.append(f"{thought}{_cut(message.content, short)}{calls}")
    return text


def _cut(text: str, short: bool) -> str:
    return f"{text[: SHORT - 1]}…" if short and len(text) > SHORT else text


def estimate_memory(prepared: Prepared, rows: Sequence[Sequence[int]]) -> dict[str, int]:
    """Bytes that training will take, by what takes them; weights are counted exactly, activations roughly.

    A token of a layer leaves about 16 H + 5 I numbers for the backward pass (H the hidden size, I the MLP's): inputs
    of norms, projections, rotations and attention, and the MLP's gate, up, activation and product. With gradient
    checkpointing it is the layer's input alone, and one layer at a time in full.

    Raises:
        UsageError: the model is no causal language model, or lacks the layers that are to be adapted.
    """
    config = prepared.config
    device = default_device()
    dtype = choose_dtype(config.model.dtype, device)
    path, trust = prepared.resolved.base_path, config.model.trust_remote_code
    shape = load_config(path, trust)
    try:
        with torch.device("meta"):
            model = find_model_class(shape).from_config(shape, dtype=dtype, trust_remote_code=trust)
    except ValueError as error:
        raise UsageError(f"{path} is no causal language model: {str(error).splitlines()[0]}") from error
    base_bytes = count_bytes(model, dtype, stored_quantization(shape) or config.model.quantize)
    with torch.device("meta"):
        matches = kinds.attach(model, config.adapter, prepared.tokenizer)
    text = shape.get_text_config()
    trained = sum(match.parameters for match in matches)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    in_full = 16 * hidden + 5 * (getattr(text, "intermediate_size", None) or 4 * hidden)
    per_token = layers * hidden + in_full if config.train.gradient_checkpointing else layers * in_full
    sizes = prepared.dataset.train.lengths
    lengths = sorted((sum(int(sizes[i]) for i in row) for row in rows), reverse=True)
    tokens = sum(lengths[: config.train.batch_size])
    # the gradient and two moments in fp32 (Muon has one of a matrix), and the adapter's weights, where not the base's
    trained_bytes = trained * 4 * (3 if config.adapter.type in ("full", "freeze") else 4)
    parts = {
        "base_weights": base_bytes,
        "adapter_and_optimizer": trained_bytes,
        "activations": tokens * per_token * dtype.itemsize,
        # logits, their softmax and gradient, in fp32; on a CPU the likelihood alone holds one of them at a time
        "logits": CHUNK_TOKENS * text.vocab_size * 4 * 3,
    }
    return {**parts, "total": sum(parts.values())}
