"""Unlikelihood training: what would be a repetition is made less likely.

After Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319). As in
`lory.losses.cross_entropy`, logits exist for a chunk of the positions at a time and their gradient is taken at once;
cross-entropy and unlikelihood share them. Here the gradient with respect to the logits z is written out. With
p = softmax(z), one candidate c brings

    -log(1 - p_c),   d/dz_c = p_c,   d/dz_k = -p_k * p_c / (1 - p_c) for k != c,

all within [-1, 1]. Up to p_c = 1/2 that is computed as it stands, log(1 - p_c) as log1p(-p_c). Beyond 1/2 the other
tokens are summed, 1 - p_c = sum over k != c of p_k, so nothing cancels or overflows however sure the model is, and no
probability is clamped. (That can be one token a position at most.)

Hand-computed: logits (0, 0, log 2) are p = (1/4, 1/4, 1/2). With target 0 and candidates {1, 2} the cross-entropy is
log 4 = 1.386 and the unlikelihood -log(3/4) - log(1/2) = 0.981.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lory.losses.chunked import score_chunks
from lory.losses.cross_entropy import Head
from lory.runtime import UsageError
from lory.types import IGNORE


class UnlikelihoodSum(NamedTuple):
    """Sums over the learnt tokens; the first three are `LossSum`'s, and divided by the same weight."""

    loss: Tensor
    """() likelihood + alpha * unlikelihood, with its gradient."""
    correct: Tensor
    """() how many tokens the model would have chosen itself, each counted with its weight."""
    weight: Tensor
    """() how many tokens were learnt, each counted with its weight."""
    likelihood: Tensor
    """() the cross-entropy, sum of -log p(token), without gradient."""
    unlikelihood: Tensor
    """() sum over tokens and their candidates of -log(1 - p(candidate)), without alpha and without gradient."""


def cross_entropy_with_unlikelihood(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    input_ids: Tensor,
    seq_lens: Tensor,
    alpha: float = 1.0,
    parameters: Sequence[Tensor] = (),
    chunk_tokens: int | None = None,
    weights: Tensor | None = None,
    eligible: Tensor | None = None,
) -> UnlikelihoodSum:
    """The token-level objective of Welleck et al. (arXiv 1908.04319, section "Unlikelihood Training").

        sum over t of  -log p(x_t | x_<t)  -  alpha * sum over c in C_t of log(1 - p(c | x_<t)),
        C_t = {x_1, ..., x_t-1} without x_t      ("previous context" candidates)

    over the learnt positions t; the context is the whole document before t, what is not learnt included. It costs a
    position one look at each different token of its document, not at the vocabulary.

    Args:
        hidden: (N, H) states, each of which predicts the label at its own index (already shifted).
        head: (n, H) -> (n, V) logits, scaling and soft-capping included.
        labels: (N) token ids, `IGNORE` where nothing is learnt.
        input_ids: (N) the token at each index, which is the last of the context that predicts its label. Ids beyond V
            (virtual tokens) are never candidates.
        seq_lens: (documents) lengths of the documents, one after the other, adding up to N; they share no context.
            Padded rows: take the padding out of every argument, or give each row's width as its length.
        alpha: how much the unlikelihood counts beside the cross-entropy; 1 in the paper.
        parameters: the head's own trainable tensors; they get a gradient, too.
        chunk_tokens: how many positions' logits exist at a time; None: as many as suit the device.
        weights: (N) how much each learnt token counts, in both parts; None: 1 each.
        eligible: (N) bool, which of `input_ids` may become candidates, such as no chat marks, or the answers' tokens
            only; None: all, as in the paper.

    Returns:
        The sums. Where nothing is learnt the loss is a zero that keeps the graph.

    Raises:
        UsageError: `seq_lens` does not add up to N.
    """
    positions = (labels != IGNORE).nonzero().squeeze(1)
    targets = labels[positions]
    context = _Context(input_ids, seq_lens, positions, eligible)
    scale = None if weights is None else weights[positions]

    def score(log_probs: Tensor, here: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        target = targets[here]
        weight = log_probs.new_ones(len(target)) if scale is None else scale[here].to(log_probs.dtype)
        likelihood = -log_probs.gather(1, target[:, None]).squeeze(1)
        correct = (log_probs.argmax(1) == target).to(log_probs.dtype)
        candidates, allowed = context.find_candidates(here, log_probs.shape[1])
        part = _score_unlikelihood(log_probs, candidates, allowed & (candidates != target[:, None]), needs_grad)
        rows = torch.stack([likelihood + alpha * part.loss, correct, likelihood, part.loss])
        if not needs_grad:
            return rows @ weight, None
        gradient = log_probs.exp_().mul_((weight * (1.0 + alpha * part.slope))[:, None])
        gradient.scatter_add_(1, target[:, None], -weight[:, None])
        part.add_rest(gradient, candidates, alpha * weight)
        return rows @ weight, gradient

    loss, sums = score_chunks(hidden[positions], head, score, 4, parameters, chunk_tokens)
    weight = (labels != IGNORE).sum() if scale is None else scale.sum()
    return UnlikelihoodSum(loss, sums[1], weight, sums[2], sums[3])


def sequence_unlikelihood(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    repeated: Tensor,
    parameters: Sequence[Tensor] = (),
    chunk_tokens: int | None = None,
    rivals: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequence-level objective of Welleck et al. (arXiv 1908.04319, section "Sequence-Level Unlikelihood").

        sum over the repeated t of -log(1 - p(x_t | x_<t))

    of continuations that the model has decoded itself. The paper averages over all tokens of the continuations, the
    repeated ones and the others, so that is the weight: the better the continuations, the smaller the loss.

    Where the model hesitates between many tokens, -log(1 - p) hardly has a gradient, yet greedy decoding takes the
    first of them and repeats it. So with `rivals` the same is asked among x_t and the R most likely other tokens only:

        sum over the repeated t of -log(sum over r in R of p(r) / (p(x_t) + sum over r in R of p(r)))

    which with one rival is -log(sigmoid(z_r - z_x)), the loss of Adolphs et al. (arXiv 2211.05826, "The CRINGE Loss",
    section 3) without its sampling: the rival is the next best token, so the loss is a function of the ids alone.

    Args:
        hidden: (N, H) states, each of which predicts the label at its own index (already shifted), from a forward pass
            over prompts and continuations.
        head: (n, H) -> (n, V) logits, scaling and soft-capping included.
        labels: (N) the continuations' tokens, `IGNORE` outside of them.
        repeated: (N) bool, which labels belong to a repetition: `repeated_ngram_mask`, flattened.
        parameters: the head's own trainable tensors; they get a gradient, too.
        chunk_tokens: how many positions' logits exist at a time; None: as many as suit the device.
        rivals: how many other tokens a repeated one is compared with; None: all, as in the paper.

    Returns:
        () the sum with its gradient, a zero that keeps the graph where nothing is repeated, and () the weight, how many
        tokens the continuations have.
    """
    positions = (repeated & (labels != IGNORE)).nonzero().squeeze(1)
    targets = labels[positions]

    def score(log_probs: Tensor, here: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        candidates = targets[here][:, None]
        if rivals is not None:
            return _score_rivals(log_probs, candidates, rivals, needs_grad)
        part = _score_unlikelihood(log_probs, candidates, torch.ones_like(candidates, dtype=torch.bool), needs_grad)
        if not needs_grad:
            return part.loss.sum()[None], None
        gradient = log_probs.exp_().mul_(part.slope[:, None])
        part.add_rest(gradient, candidates, torch.ones_like(part.loss))
        return part.loss.sum()[None], gradient

    loss, _ = score_chunks(hidden[positions], head, score, 1, parameters, chunk_tokens)
    return loss, (labels != IGNORE).sum()


def _score_rivals(log_probs: Tensor, repeated: Tensor, rivals: int, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of (n, 1) repeated tokens among their `rivals` most likely others, summed, and its gradient (n, V)."""
    chosen = log_probs.gather(1, repeated)
    others = log_probs.scatter_(1, repeated, -torch.inf)
    best, places = others.topk(min(rivals, others.shape[1] - 1))
    # log(p(x) / sum of p(r)): the odds of repeating
    odds = chosen - best.logsumexp(1, keepdim=True)
    loss = F.softplus(odds).sum()[None]
    if not needs_grad:
        return loss, None
    share = odds.sigmoid()
    gradient = log_probs.zero_().scatter_(1, repeated, share)
    return loss, gradient.scatter_(1, places, -share * best.softmax(1))


def repeated_ngram_mask(ids: Tensor, n: int = 4, lengths: Tensor | None = None, last: bool = False) -> Tensor:
    """Which tokens belong to an n-gram that began at an earlier place of the same row, too.

    This is C^t_repeat-n of Welleck et al. (arXiv 1908.04319, section "Sequence-Level Unlikelihood"). N-grams overlap,
    as in seq-rep-n: in 7 7 7 7 7 the second 4-gram repeats the first. By hand, n = 2: in 1 2 3 1 2 4 the tokens 1 2 at
    the fourth and fifth place.

    Args:
        ids: (B, L) continuations.
        n: length of the n-grams, in tokens.
        lengths: (B) how many tokens of each row are real; None: all.
        last: mark the last token of each such n-gram only, the one that makes it a repetition.

    Returns:
        (B, L) bool.

    Raises:
        UsageError: `n` is below 1.
    """
    if n < 1:
        raise UsageError(f"n = {n} was given for the repeated n-grams; give a length of 1 or more tokens.")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    starts = ids.shape[1] - n + 1
    if starts < 1 or not len(ids):
        return mask
    rows = torch.arange(len(ids), device=ids.device)[:, None, None].expand(-1, starts, 1)
    ngrams = torch.cat([rows, ids.unfold(1, n, 1)], dim=2).flatten(0, 1)
    _, number = torch.unique(ngrams, dim=0, return_inverse=True)
    place = torch.arange(len(ngrams), device=ids.device)
    first = torch.full_like(place, len(ngrams)).scatter_reduce(0, number, place, "amin")
    again = (place > first[number]).view(len(ids), starts)
    if lengths is not None:
        again &= torch.arange(starts, device=ids.device) + n <= lengths.to(ids.device)[:, None]
    for offset in range(n - 1 if last else 0, n):
        mask[:, offset : offset + starts] |= again
    return mask


class _Context:
    """Which tokens stand before each position in its document, kept as one line of different tokens a document."""

    def __init__(self, input_ids: Tensor, seq_lens: Tensor, positions: Tensor, eligible: Tensor | None) -> None:
        if int(seq_lens.sum()) != len(input_ids):
            raise UsageError(f"seq_lens adds up to {int(seq_lens.sum())}, but there are {len(input_ids)} tokens.")
        device = input_ids.device
        document = torch.repeat_interleave(torch.arange(len(seq_lens)), seq_lens.cpu()).to(device)
        places = torch.arange(len(input_ids), device=device)
        if eligible is not None:
            places = places[eligible]
        base = int(input_ids.max()) + 1 if len(input_ids) else 1
        # sorted, hence document by document
        pairs, inverse = torch.unique(document[places] * base + input_ids[places], return_inverse=True)
        first = torch.full_like(pairs, len(input_ids)).scatter_reduce(0, inverse, places, "amin")
        counts = torch.bincount(pairs // base, minlength=len(seq_lens)).tolist()
        self.positions, self.document = positions, document[positions]
        self.ids, self.first, self.never = (pairs % base).split(counts), first.split(counts), len(input_ids)

    def find_candidates(self, here: slice, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(n, U) the tokens of each position's document, and (n, U) whether they stand at or before the position."""
        document = self.document[here]
        lowest, highest = int(document[0]), int(document[-1])
        ids = pad_sequence(self.ids[lowest : highest + 1], batch_first=True)[document - lowest]
        first = pad_sequence(self.first[lowest : highest + 1], batch_first=True, padding_value=self.never)
        allowed = (first[document - lowest] <= self.positions[here][:, None]) & (ids < vocabulary)
        return ids.clamp(max=vocabulary - 1), allowed


class _Part(NamedTuple):
    """The unlikelihood of a chunk's rows and what its gradient is made of."""

    loss: Tensor
    """(n) sum over the row's candidates of -log(1 - p)."""
    slope: Tensor
    """(n) the gradient is p * slope + rest."""
    odds: Tensor
    """(n, U) p / (1 - p) of the candidates up to p = 1/2, 0 for the others: the rest at the candidates."""
    sure: Tensor
    """(r) the rows with a candidate beyond p = 1/2."""
    others: Tensor
    """(r, V) p_k / (1 - p_c) of those rows, 0 at the candidate c itself: minus the rest in those rows."""

    def add_rest(self, gradient: Tensor, candidates: Tensor, scale: Tensor) -> None:
        """Add what is not p * slope, each row times `scale` (n), to `gradient` (n, V)."""
        gradient.scatter_add_(1, candidates, self.odds * scale[:, None])
        gradient.index_add_(0, self.sure, self.others * -scale[self.sure, None])


def _score_unlikelihood(log_probs: Tensor, candidates: Tensor, allowed: Tensor, needs_grad: bool) -> _Part:
    """Unlikelihood of (n, V) log-probabilities with (n, U) candidate ids, of which those that are `allowed` count."""
    chosen = log_probs.gather(1, candidates).exp()
    likely = allowed & (chosen > 0.5)
    rare = torch.where(allowed & ~likely, chosen, 0.0)
    loss = -torch.log1p(-rare).sum(1)
    odds = rare / (1.0 - rare)
    slope = likely.any(1).to(odds.dtype) - odds.sum(1)
    sure, column = likely.nonzero(as_tuple=True)
    others = log_probs[sure].scatter_(1, candidates[sure, column][:, None], -torch.inf)
    log_rest = others.logsumexp(1)
    loss = loss.index_add(0, sure, -log_rest)
    if needs_grad:
        others = others.sub_(log_rest[:, None]).exp_()
    return _Part(loss, slope, odds, sure, others)
