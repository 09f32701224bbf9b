"""Answers that are decoded by themselves, beside the batch: one step of each in each turn of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lory.decoding.contrastive_search import contrastive_steps
from lory.decoding.loop import GrowingLayer
from lory.generate import generation_arguments
from lory.server.answers import Answer
from lory.server.sampling import list_processors

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

Tokens = Iterator[tuple[int, Tensor | None]]
"""The tokens of an answer, with the logits (V,) they were chosen by; choosing contrastively, there are none to tell."""


def search_contrastively(model: PreTrainedModel, answer: Answer) -> Tokens:
    """The tokens of contrastive search, as `lory.generate` has them."""
    job = answer.job
    options = job.sampling.options
    assert options.penalty_alpha is not None
    # the processors here do what transformers would do, and the bias, which it has not
    plain = {"repetition_penalty": 1.0, "repetition_window": None, "repetition_counts": "all"}
    changes = {"max_new_tokens": job.answer_tokens, "no_repeat_ngram_size": 0, **plain}
    arguments = generation_arguments(
        model, len(job.prompt), options.model_copy(update=changes), sorted(job.terminators)
    )
    arguments["logits_processor"] = list_processors(job.sampling, len(job.prompt), job.seed)
    inputs = _list_inputs(model, job.prompt, {})
    for step in contrastive_steps(model, inputs, arguments, options.penalty_alpha, options.top_k):
        token = step.tokens[0]
        assert token is not None
        yield token, None


def decode_alone(model: PreTrainedModel, answer: Answer) -> Tokens:
    """The tokens that the answer's sampler chooses, the model being run as transformers' generation runs it."""
    row = AloneRow(model, answer.job.prompt, answer.job.inputs)
    while (token := answer.sampler.choose(row.logits)) is not None:
        yield token, row.logits
        row.feed(token)


def _list_inputs(model: PreTrainedModel, ids: Sequence[int], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    device = model.device
    input_ids = torch.tensor([list(ids)], device=device)
    own = {name: _place(value, model) for name, value in inputs.items()}
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **own}


def _place(value: Tensor, model: PreTrainedModel) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


class AloneRow:
    """A prompt, read as transformers' generation reads it, and what follows.

    Attributes:
        logits: (V,) fp32, of the next token.
        cache: keys and values of all tokens so far.
        offset: the next token's position less the number of tokens before it, which is not 0 where the tokens of an
            image share positions.
    """

    logits: Tensor
    cache: Cache
    offset: int

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        self._model = model
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        given = _list_inputs(model, ids, inputs)
        model.generate(
            **given, past_key_values=self.cache, max_length=None, max_new_tokens=1, custom_generate=self._start
        )

    def _start(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        self._ids, self._kwargs = input_ids, model_kwargs
        self._note(model._prefill(input_ids, generation_config, model_kwargs))
        positions = self._kwargs.get("position_ids")
        self.offset = 0 if positions is None else int(positions.flatten(0, -2)[-1, -1]) - input_ids.shape[1]
        return input_ids

    def feed(self, token: int) -> None:
        """Go on with this token."""
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1)
        inputs = self._model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **self._kwargs)
        self._note(self._model(**inputs, return_dict=True))

    def _note(self, outputs: Any) -> None:
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)
        self.logits = outputs.logits[0, -1].float()
