"""What a run minimises: a model and its loss in one module, and the part of the config that sets the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from lory.adapters.prefix import packed_prefix, prefix_arguments
from lory.adapters.unadapted import check_removable, unadapted
from lory.config import Section
from lory.data.mixture.collate import Batch
from lory.losses.contrastive import contrastive_loss
from lory.losses.cross_entropy import cross_entropy
from lory.losses.divergence import divergence
from lory.losses.noise import add_embedding_noise
from lory.losses.unlikelihood import cross_entropy_with_unlikelihood, sequence_unlikelihood
from lory.models.attention import document_arguments
from lory.models.fused_body import fused_layers
from lory.models.head import split_head
from lory.models.kernels import PLAIN, Kernels
from lory.runtime import log
from lory.types import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lory.training.sight import Sight


class UnlikelihoodConfig(Section):
    """Training against repetition (Welleck et al. 2020, arXiv 1908.04319)."""

    token: float = Field(
        0.0, ge=0, description="Weight of the token-level loss: tokens of the context are made less likely."
    )
    sequence_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps in which the model also continues texts by itself, and what it repeats there "
        "is made less likely.",
    )
    sequence: float = Field(1.0, gt=0, description="Weight of the sequence-level loss in these steps.")
    sequences: int = Field(8, ge=1, description="Texts that are continued in such a step, by each process.")
    prefix_tokens: int = Field(
        50, ge=1, description="Tokens of a plain text before its continuation; a chat is continued from its prompt."
    )
    completion_tokens: int = Field(100, ge=8, description="Longest continuation, in tokens.")
    ngram: int = Field(4, ge=1, description="A token is repeated when it is part of so long a stretch seen before.")
    penalize: Literal["ngram", "last"] = Field(
        "ngram",
        description="What of a repeated stretch is made less likely: all of its tokens, as in the paper, or the last "
        "one, which makes it a repetition.",
    )
    rivals: int | None = Field(
        None,
        ge=1,
        description="A repeated token is made less likely than so many most likely others, one of which decoding would "
        "take instead; null: than all others together, as in the paper, which hardly moves a token that leads with "
        "little probability.",
    )
    divergence: float = Field(
        0.0,
        ge=0,
        description="Weight of the divergence to the model without its adapter over the continuations' tokens that "
        "repeat nothing, so that the way out of a repetition is one that the model would have gone itself. It takes "
        "one more forward pass.",
    )


class ContrastiveConfig(Section):
    """SimCTG's loss on the states of tokens (Su et al. 2022, arXiv 2202.06417)."""

    weight: float = Field(0.0, ge=0, description="Its weight; the paper has 1.")
    margin: float = Field(
        0.5, ge=-1, le=1, description="Different tokens' states are pushed below 1 - margin in cosine."
    )


class LossConfig(Section):
    """What is added to the likelihood of the data; by default nothing."""

    unlikelihood: UnlikelihoodConfig = Field(
        default_factory=UnlikelihoodConfig, description="Against repetition, in what the model writes."
    )
    contrastive: ContrastiveConfig = Field(
        default_factory=ContrastiveConfig, description="Against repetition, in how the model sees its tokens."
    )
    divergence: float = Field(
        0.0,
        ge=0,
        description="Weight of the Kullback-Leibler divergence to the model without its adapter, over the learnt "
        "tokens: what the other losses do not ask for stays as it was. It takes one more forward pass.",
    )
    embedding_noise: float = Field(
        0.0, ge=0, description="NEFTune's alpha (Jain et al. 2023, arXiv 2310.05914): noise on the embeddings."
    )


class Terms(NamedTuple):
    """Sums of one batch. Each is divided by its weight over all ranks and micro-batches, which is known before."""

    loss: Tensor
    """() with gradient: likelihood and token-level unlikelihood of the learnt tokens, or what continuations repeat."""
    correct: Tensor
    """() weight of the learnt tokens that the model would have chosen itself."""
    weight: Tensor
    """() weight of the learnt tokens, or the number of a continuation's."""
    unlikelihood: Tensor
    """() the token-level unlikelihood alone, without its weight and without gradient."""
    contrastive: Tensor
    """() the contrastive loss over documents, with gradient."""
    divergence: Tensor
    """() how far the learnt tokens' distributions, or a continuation's, are from those without the adapter, with
    gradient."""


class Objective(nn.Module):
    """A model and its loss in one module, so that data parallelism wraps the whole of what is differentiated."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LossConfig | None = None,
        *,
        sight: Sight | None = None,
        kernels: Kernels = PLAIN,
    ) -> None:
        """`sight`: what images go through, of a model that sees; `kernels`: for elementwise parts of fused layers."""
        super().__init__()
        self.model = model
        self.config = config or LossConfig()
        for field, weight in (
            ("loss.divergence", self.config.divergence),
            ("loss.unlikelihood.divergence", self.config.unlikelihood.divergence),
        ):
            if weight:
                check_removable(model, field)
        # kept out of the module's children: they are the model's own
        self._parts = [split_head(model)]
        self._sight = [sight]
        self._fused, reason = fused_layers(model, kernels)
        if self._fused is None:
            log.info("The model's own layers are trained as they are, since %s.", reason)

    def forward(self, batch: Batch, draw: torch.Generator | None = None) -> Terms:
        """Sums over the batch; in evaluation the likelihood alone.

        Args:
            draw: where the noise on the embeddings comes from.
        """
        head = self._parts[0][1]
        states, targets = self._run_body(batch, draw).flatten(0, 1), batch.targets.flatten()
        parameters = list(head.linear.parameters())
        zero = torch.zeros((), device=states.device)
        if batch.continues:
            assert batch.weights is not None
            repeated = batch.weights.flatten() > 0
            loss, count = sequence_unlikelihood(
                states, head, targets, repeated, parameters, rivals=self.config.unlikelihood.rivals
            )
            distance = zero
            if self.config.unlikelihood.divergence:
                distance = self._diverge(batch, states, targets.masked_fill(repeated, IGNORE), None)
            return Terms(loss, zero, count, zero, zero, distance)
        weights = None if batch.weights is None else batch.weights.flatten()
        contrastive = distance = zero
        if self.training and self.config.contrastive.weight:
            kept = states if batch.attention_mask is None else states[batch.attention_mask.flatten() > 0]
            contrastive, _ = contrastive_loss(kept, batch.seq_lens, self.config.contrastive.margin, batch.counts)
        if self.training and self.config.divergence:
            distance = self._diverge(batch, states, targets, weights)
        if self.training and (alpha := self.config.unlikelihood.token):
            # a padded row counts as one document: nothing is learnt after its end
            padded = batch.attention_mask is not None
            widths = torch.full((len(batch.targets),), batch.targets.shape[1]) if padded else batch.seq_lens
            both = cross_entropy_with_unlikelihood(
                states, head, targets, batch.input_ids.flatten(), widths, alpha, parameters, weights=weights
            )
            return Terms(both.loss, both.correct, both.weight, both.unlikelihood, contrastive, distance)
        sums = cross_entropy(states, head, targets, parameters, weights=weights)
        return Terms(sums.loss, sums.correct, sums.weight, zero, contrastive, distance)

    def _diverge(self, batch: Batch, states: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """() sum of the divergence to the model without its adapter."""
        head = self._parts[0][1]
        with torch.no_grad(), unadapted(self.model):
            before = self._run_body(batch, None).flatten(0, 1)

        def reference_head(hidden: Tensor) -> Tensor:
            with unadapted(head.linear):
                return head(hidden)

        parameters = list(head.linear.parameters())
        return divergence(states, head, before, reference_head, targets, parameters, weights=weights)

    def _run_body(self, batch: Batch, draw: torch.Generator | None) -> Tensor:
        """(B, T, H) last hidden states; of tokens where nothing is learnt and no loss looks, they may be anything."""
        noise = self.config.embedding_noise if self.training and draw is not None and not batch.continues else 0.0
        if self._fused is not None and not noise and self._fused.covers(batch.attention_mask):
            # the contrastive loss compares all tokens of a document
            whole = self.training and self.config.contrastive.weight and not batch.continues
            return self._fused(batch.input_ids, batch.seq_lens, None if whole else batch.targets != IGNORE)
        if (sight := self._sight[0]) is not None:
            return sight.run_body(batch)
        body = self._parts[0][0]
        if batch.attention_mask is None:
            arguments = document_arguments(batch.seq_lens, batch.input_ids.device) | packed_prefix(self.model)
        else:
            arguments = {"attention_mask": batch.attention_mask}
            arguments |= prefix_arguments(self.model, batch.attention_mask)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if noise and draw is not None:
            embeddings = self.model.get_input_embeddings()(batch.input_ids)
            inputs = {"inputs_embeds": add_embedding_noise(embeddings, batch.seq_lens, noise, draw)}
        # a cache would make the model forget where documents begin
        hidden: Tensor = body(**inputs, use_cache=False, **arguments).last_hidden_state
        return hidden
