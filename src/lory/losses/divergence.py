"""How far a model has gone from what it was: the Kullback-Leibler divergence of their next-token distributions.

With q the distribution of the model as it was and p that of the trained one, a position brings

    KL(q || p) = sum over k of q_k * (log q_k - log p_k),   d/dz = p - q

with respect to the trained logits z. It is at least 0, and 0 where nothing has changed. The likelihood knows of one
token at a position, the one that came; this knows of all, so its gradient is far less noisy, and few texts are enough
to hold a model where it is.

Hand-computed: q = (1/2, 1/2) and p = (1/4, 3/4) give log 2 - log(3)/2 = 0.144.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lory.losses.chunked import score_chunks
from lory.losses.cross_entropy import Head
from lory.types import IGNORE


def divergence(
    hidden: Tensor,
    head: Head,
    reference: Tensor,
    reference_head: Head,
    labels: Tensor,
    parameters: Sequence[Tensor] = (),
    chunk_tokens: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over the learnt positions of KL(reference || model), each times its weight.

    Args:
        hidden: (N, H) states of the model in training.
        head: (n, H) -> (n, V) its logits.
        reference: (N, H) states of the model as it was, for the same tokens; they get no gradient.
        reference_head: (n, H) -> (n, V) its logits.
        labels: (N) token ids, `IGNORE` where nothing is learnt.
        parameters: the head's own trainable tensors; they get a gradient, too.
        chunk_tokens: how many positions' logits exist at a time; None: as many as suit the device.
        weights: (N) how much each learnt position counts; None: 1 each.

    Returns:
        () the sum in fp32 or wider, with its gradient; where nothing is learnt a zero that keeps the graph.
    """
    positions = (labels != IGNORE).nonzero().squeeze(1)
    before = reference.detach()[positions]
    scale = None if weights is None else weights[positions]

    def score(log_probs: Tensor, here: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            expected = F.log_softmax(reference_head(before[here]), dim=1, dtype=log_probs.dtype)
        # where a token is impossible, it is so for both: 0 * (-inf + inf) is 0 here
        gap = (expected - log_probs).nan_to_num_(nan=0.0)
        expected.exp_()
        each = (expected * gap).sum(1)
        weight = torch.ones_like(each) if scale is None else scale[here].to(each.dtype)
        total = (each * weight).sum()[None]
        return total, log_probs.exp_().sub_(expected).mul_(weight[:, None]) if needs_grad else None

    loss, _ = score_chunks(hidden[positions], head, score, 1, parameters, chunk_tokens)
    return loss
