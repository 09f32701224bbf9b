"""Keeping packed documents apart: attention that runs document by document over one row without padding.

A batch is one row of documents, one after the other, with position ids that start anew at each. The model gets the
documents' borders as ``cu_seq_lens_q``, the argument that transformers hands through to every attention function, and
the function registered here attends within each. It is chosen on the instance's config; nothing is patched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lory_documents"


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

    Returns:
        (1, T, heads, head_dim).
    """
    if cu_seq_lens_q is None or attention_mask is not None or unused.get("s_aux") is not None:
        raise ValueError("packed attention needs the documents' borders, no mask and no attention sinks")
    outputs = []
    for start, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
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
    grouped = q.shape[1] != k.shape[1]
    if window is not None and window >= length:
        window = None
    if softcap is None and window is None:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    weights = F.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


@contextlib.contextmanager
def documents_apart(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, `model` attends document by document; the backward pass belongs inside, too.

    (A checkpointed layer runs its forward again in the backward pass, with the attention that is set by then.)
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_documents)
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether packing is safe with this model: two documents in one row give the states that each gives alone.

    Measured, not looked up: a model may ignore the borders without a word (position biases, convolutions, recurrent
    states, masks of its own).
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = (5, 7)
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


def document_arguments(seq_lens: Tensor, device: torch.device) -> dict[str, Any]:
    """What a model's forward is given, inside `documents_apart`, for a row of documents of these lengths."""
    borders = F.pad(seq_lens.cumsum(0), (1, 0)).to(torch.int32)
    position_ids = torch.cat([torch.arange(length) for length in seq_lens.tolist()])[None]
    longest = int(seq_lens.max())
    return {
        "position_ids": position_ids.to(device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
