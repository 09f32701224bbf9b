"""NEFTune: noise on the embeddings of what is trained on, against learning the records by heart.

After Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (arXiv 2310.05914), algorithm 1:
X' = X + alpha / sqrt(L * d) * e, each e uniform in [-1, 1), L the document's length in tokens, d the width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lory.runtime import UsageError


def add_embedding_noise(embeddings: Tensor, seq_lens: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """The embeddings with NEFTune's noise, each document by its own length.

    The draws go by the documents' tokens in their order and leave padding out, so the same documents get the same
    noise packed and padded. Their number depends on the lengths alone: a generator seeded from (seed, step, rank), or
    one whose state is stored with the checkpoint, gives a resumed run the noise of an uninterrupted one.

    It belongs between the embedding layer and the model's body, while training only:
    ``body(inputs_embeds=add_embedding_noise(model.get_input_embeddings()(input_ids), ...), ...)``.

    Args:
        embeddings: (1, T, d) one row of documents without padding, or (B, T, d) a document a row, padded at the right.
        seq_lens: (documents) lengths in tokens: adding up to T, or B of them.
        alpha: the noise's strength; the paper has 5, 10 and 15. A document's noise has the expected length
            alpha / sqrt(3), however long it is.
        generator: where the draws come from; on the CPU, every device gets the same noise.

    Returns:
        The embeddings' shape and dtype.

    Raises:
        UsageError: `seq_lens` fits neither layout.
    """
    rows, width, size = embeddings.shape
    tokens, longest = int(seq_lens.sum()), int(seq_lens.max())
    packed = rows == 1 and tokens == width
    if not packed and (len(seq_lens) != rows or longest > width):
        raise UsageError(f"{len(seq_lens)} documents of {tokens} tokens do not fit into {rows} rows of {width} tokens.")
    draws = torch.rand(tokens, size, generator=generator, device=generator.device).mul_(2.0).sub_(1.0)
    lengths = torch.repeat_interleave(seq_lens, seq_lens).to(draws.device)
    draws *= (alpha / math.sqrt(size)) * lengths[:, None].rsqrt()
    noise = draws.to(embeddings)
    if packed:
        return embeddings + noise
    real = torch.arange(width, device=embeddings.device) < seq_lens.to(embeddings.device)[:, None]
    return embeddings + torch.zeros_like(embeddings).masked_scatter(real[..., None], noise)
