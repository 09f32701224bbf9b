"""Keeping packed documents apart: attention that runs document by document over one row without padding.

A batch is one row of documents, one after the other, with position ids that start anew at each. The model gets the
documents' borders as ``cu_seq_lens_q``, the argument that transformers hands through to every attention function, and
the function registered here attends within each. It is chosen on the instance's config; nothing is patched.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.models.fused_attention import Attention, Seen
from lory.models.varlen import Spans, attend_spans, choose_kernel, hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lory_documents"

# Where our own blocks (`fused_attention`) do not do, for dropout, caps and prefixes: on a CPU, torch's fused attention
# takes 4 to 5 times as long as plain products up to about this many tokens
SHORT_TOKENS = 128


def attend_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_states: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a row (transformers' attention interface).

    Args:
        query: (1, heads, T, head_dim).
        key, value: (1, kv_heads, T, head_dim).
        cu_seq_lens_q: (documents + 1) borders of the documents in the row, from 0 to T, on the CPU.
        sliding_window: a token sees this many tokens, itself included.
        softcap: scores are softcap * tanh(scores / softcap) (Gemma 2).
        prefix_states: (2 * layers, 1, kv_heads, P, head_dim) keys of layer 0, values of layer 0, keys of layer 1, ...
            that stand in place of those of each document's first P tokens.
        cu_seq_lens_k: the borders on the row's device.

    Returns:
        (1, T, heads, head_dim).
    """
    if cu_seq_lens_q is None or attention_mask is not None or unused.get("s_aux") is not None:
        raise ValueError("packed attention needs the documents' borders, no mask and no attention sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    borders = tuple(cu_seq_lens_q.tolist())
    # with oneDNN's products a third of the fused attention's time at 100 tokens, two thirds at 400, the same at 1,600
    if query.is_cpu and softcap is None and not dropout and prefix_states is None:
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        return Attention.apply(q, k, v, Seen(borders, scale, sliding_window))[None], None
    kernel = choose_kernel(query.device, query.dtype, query.shape[-1], dropout, softcap)
    if prefix_states is None and kernel != "documents":
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        spans = Spans.of(borders, query.device) if cu_seq_lens_k is None else Spans(borders, cu_seq_lens_k)
        return attend_spans(q, k, v, spans, scale, sliding_window, dropout, softcap)[None], None
    outputs = []
    for start, end in itertools.pairwise(borders):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        if prefix_states is not None:
            states = prefix_states[2 * module.layer_idx :][:2]
            k, v = (
                torch.cat([s.to(t.dtype), t[:, :, s.shape[2] :]], dim=2) for s, t in zip(states, (k, v), strict=True)
            )
        outputs.append(_attend(q, k, v, scaling, dropout, sliding_window, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of one document: (1, heads, t, head_dim)."""
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    if softcap is not None or (q.device.type == "cpu" and length <= SHORT_TOKENS):
        return _attend_plainly(q, k, v, scaling, dropout, window, softcap)
    grouped = q.shape[1] != k.shape[1]
    visible = None if window is None else ~hidden(length, window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=visible is None, scale=scaling, enable_gqa=grouped
    )


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """The same, as products of matrices with all scores in memory."""
    _, heads, length, head_dim = q.shape
    groups = k.shape[1]
    # the heads that share keys stand one below the other: (groups, heads / groups * t, head_dim)
    stacked = q.reshape(groups, heads // groups * length, head_dim) * (head_dim**-0.5 if scaling is None else scaling)
    scores = (stacked @ k[0].transpose(1, 2)).view(groups, heads // groups, length, length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden(length, window, q.device), -torch.inf)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.view(groups, -1, length) @ v[0]).view(1, heads, length, head_dim)


@contextlib.contextmanager
def documents_apart(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, `model` attends document by document; the backward pass belongs inside, too.

    (A checkpointed layer runs its forward again in the backward pass, with the attention that is set by then.)
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_documents)
    text = model.config.get_text_config()
    own = text._attn_implementation
    # a tower attends as it does
    part = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    model.set_attn_implementation(NAME if part is None else {part: NAME})
    try:
        yield
    finally:
        model.set_attn_implementation(own if part is None else {part: own})


def keeps_documents_apart(model: PreTrainedModel, longest: int = 0) -> bool:
    """Whether packing is safe with this model: two documents in one row give the states that each gives alone.

    Measured, not looked up: a model may ignore the borders without a word (position biases, convolutions, recurrent
    states, masks of its own).

    Args:
        longest: tokens of the longest document there will be. If it exceeds the model's attention window, one of the
            two documents does, too, since some models keep to their window by a mask alone.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # twice the window: half of the tokens then do not see the first ones, which shows clearly
    lengths = (5, max([7, *(min(2 * window, longest) for window in _list_windows(model) if window < longest)]))
    documents = [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in lengths]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)
            with documents_apart(model):
                row = torch.cat(documents, dim=1)
                packed = model(row, use_cache=False, **document_arguments(torch.tensor(lengths), device)).logits
    except (TypeError, ValueError, RuntimeError):
        # it does not take the arguments, which is the answer to the question
        return False
    finally:
        model.train(training)
    # rounding differs between the two ways; a leak is larger by orders of magnitude
    limit = 1e-3 if packed.dtype == torch.float32 else 5e-2
    return bool((packed - alone).abs().max() <= limit * alone.abs().max().clamp(min=1e-6))


def _list_windows(model: PreTrainedModel) -> list[int]:
    """How many tokens back the model's local attention sees, as its config says."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in windows if window]


def document_arguments(seq_lens: Tensor, device: torch.device) -> dict[str, Any]:
    """What a model's forward is given, inside `documents_apart`, for a row of documents of these lengths."""
    borders = F.pad(seq_lens.cumsum(0), (1, 0)).to(torch.int32)
    position_ids = torch.cat([torch.arange(length) for length in seq_lens.tolist()])[None]
    longest = int(seq_lens.max())
    return {
        "position_ids": position_ids.to(device),
        "cu_seq_lens_q": borders,
        # where the kernels of a device look for them
        "cu_seq_lens_k": borders.to(device, non_blocking=True),
        "max_length_q": longest,
        "max_length_k": longest,
    }
