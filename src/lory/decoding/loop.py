"""The decode loop: one token at a time for each row, chosen as transformers' `generate` chooses it.

`generate` prepares everything (inputs, masks, processors, criteria, the first cache) and hands over to the steps here
instead of its own loop, through its argument ``custom_generate``. So every option means what it means to transformers,
and the same seed draws the same tokens. What is different: the steps are an iterator that is read at the reader's pace
and can be dropped at any token, the cache grows in place, and a watcher may stop a row, change the scores or go back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lory.runtime import LoryError, UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

# Tokens that a cache has room for at first; it doubles when it is full
_FIRST_ROOM = 256
# What has an entry for each token and therefore is cut when the loop goes back
_PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a watcher wants done in place of going on as usual."""

    scores: Tensor | None = None
    """(B, V) to choose from instead."""
    stop: Tensor | None = None
    """(B,) bool, rows that end before this token."""
    back: int = 0
    """How many tokens are taken back from the end of every row before the next is chosen; `scores` and `stop` are not
    looked at then, since the watcher is asked again."""


class Watcher(Protocol):
    """Looks at each step before its token is chosen."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Verdict | None:
        """Judge (B, T) prompt and answer so far, and the (B, V) processed scores of the next token; None: go on."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    tokens: list[int | None]
    """The new token of each of the B rows; None where the row has ended before."""
    finished: bool
    """Whether all rows have ended, so that this is the last step."""
    back: int = 0
    """How many tokens were taken back from each row; then there are no new ones."""
    logprobs: Tensor | None = None
    """(B,) log-probability of each new token by the model's own scores, before any option changes them."""
    top_logprobs: Tensor | None = None
    """(B, K) the K largest log-probabilities, largest first."""
    top_tokens: Tensor | None = None
    """(B, K) the tokens they belong to."""


def decode_steps(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    generator: torch.Generator | None = None,
    watch: Watcher | None = None,
    logprobs: int | None = None,
    forward: Callable[..., Any] | None = None,
) -> Iterator[Step]:
    """Continue each row of `inputs`, step by step; dropping the iterator stops at once.

    Args:
        inputs: what `model.generate` takes as inputs: `input_ids` (B, T), padded on the left under an
            `attention_mask` (B, T), and whatever else belongs to the prompt.
        arguments: options of `model.generate`. A stop string is given as a `StopStringCriteria` among its
            `stopping_criteria`.
        generator: drawn from in place of torch's global one; seeded alike, both draw the same.
        watch: sees each step before its token is chosen.
        logprobs: give the new tokens' log-probabilities, and those of so many likeliest (0: none beside).
        forward: called in place of the model, with the arguments that generation gives it and a `DynamicCache`.

    Raises:
        UsageError: a search with several beams is asked for.
        LoryError: the watcher goes back where that cannot be done.
    """

    def start(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[Step]:
        if generation_config.num_beams != 1:
            raise UsageError(f"num_beams={generation_config.num_beams} was given; only 1 can be decoded step by step.")
        # a cache that was handed in may be in use elsewhere, and is left as it is
        if "past_key_values" not in inputs:
            grow_in_place(model_kwargs.get("past_key_values"))
        loop = _Loop(model, forward, input_ids, generation_config, model_kwargs)
        return loop.run(logits_processor, stopping_criteria, generator, watch, logprobs)

    steps = model.generate(**inputs, **arguments, custom_generate=start)
    return cast("Iterator[Step]", steps)


class _Loop:
    """The state of a decoding: the rows so far, and what the model's forward is given."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any] | None,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.ids, self.config, self.kwargs = model, input_ids, config, model_kwargs
        # it is written for the cache that grows
        grows = isinstance(model_kwargs.get("past_key_values"), DynamicCache)
        self.forward = forward if forward is not None and grows else model
        self.prompt_tokens = input_ids.shape[1]
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)

    @torch.inference_mode()
    def run(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generator: torch.Generator | None,
        watch: Watcher | None,
        logprobs: int | None,
    ) -> Iterator[Step]:
        """The steps, as `decode_steps` has it."""
        # generate pads only where there is an end of sequence to follow
        pad = self.config._pad_token_tensor if any(hasattr(c, "eos_token_id") for c in criteria) else None
        running = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        nothing: list[int | None] = [None] * len(self.ids)
        logits = self._feed_prompt()
        while True:
            # a copy, since processors may write into what they are given
            scores = processors(self.ids, logits.clone())
            if watch is not None and (verdict := watch(self.ids, scores)) is not None:
                if verdict.back:
                    logits = self._go_back(verdict.back)
                    yield Step(nothing, False, back=verdict.back)
                    continue
                scores = scores if verdict.scores is None else verdict.scores
                if verdict.stop is not None:
                    running = running & ~verdict.stop.to(running.device)
                if not running.any():
                    yield Step(nothing, True)
                    return
            chosen = self._choose(scores, generator)
            if pad is not None:
                chosen = torch.where(running, chosen, pad.to(chosen.device))
            tokens = [token if on else None for token, on in zip(chosen.tolist(), running.tolist(), strict=True)]
            self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
            running = running & ~criteria(self.ids, None)
            finished = not bool(running.any())
            yield Step(tokens, finished, 0, *_measure(logits, chosen, logprobs))
            if finished:
                return
            logits = self._feed_token()

    def _choose(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        """A token for each row, (B,)."""
        if not self.config.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(1)

    def _feed_prompt(self) -> Tensor:
        cache = self.kwargs.get("past_key_values")
        fresh = isinstance(cache, Cache) and cache.get_seq_length() == 0 and self.config.prefill_chunk_size is None
        if self.forward is self.model or not fresh:
            return self._note(self.model._prefill(self.ids, self.config, self.kwargs))
        inputs = self.model.prepare_inputs_for_generation(self.ids, is_first_iteration=True, **self.kwargs)
        return self._note(self.forward(**inputs))

    def _feed_token(self) -> Tensor:
        """Run the model on the last token of each row (without a cache: on all); the next one's logits (B, V), fp32."""
        length = 1 if self.kwargs.get("use_cache") else None
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=length, **self.kwargs)
        return self._note(self.forward(**inputs, return_dict=True))

    def _note(self, outputs: Any) -> Tensor:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.is_encoder_decoder
        )
        # fp32 as in `generate`
        logits: Tensor = outputs.logits[:, -1].to(dtype=torch.float32, device=self.ids.device)
        return logits

    def _go_back(self, tokens: int) -> Tensor:
        """Take the last `tokens` back from every row; returns the logits of the token after what is left."""
        answer = self.ids.shape[1] - self.prompt_tokens
        cache = self.kwargs.get("past_key_values")
        if not 0 < tokens <= answer:
            raise LoryError(f"{tokens} tokens should be taken back from an answer of {answer}; give 1 to {answer}.")
        if tokens == answer and "inputs_embeds" in self.kwargs:
            raise LoryError("An answer after a soft prompt cannot be taken back as a whole; leave a token of it.")
        if not (isinstance(cache, Cache) and cache.is_croppable):
            raise LoryError(f"{type(self.model).__name__} cannot go back over tokens; decode it without that.")
        try:
            # the last token that stays is fed once more, for its logits
            cache.crop(-(tokens + 1))
        except RuntimeError as error:
            raise LoryError(f"The model's cache has forgotten what it would go back to: {error}") from error
        for name in _PER_TOKEN:
            if self.kwargs.get(name) is not None:
                self.kwargs[name] = self.kwargs[name][..., : -(tokens + 1)]
        self.ids = self.ids[:, :-tokens]
        return self._feed_token()


def _measure(logits: Tensor, chosen: Tensor, count: int | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a `Step` says of log-probabilities: of `chosen` (B,), and the `count` largest with their tokens."""
    if count is None:
        return None, None, None
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[:, None]).squeeze(1)
    if count == 0:
        return own, None, None
    top = logprobs.topk(count, dim=-1)
    return own, top.values, top.indices


class GrowingLayer(DynamicLayer):
    """A cache layer that has room ahead, so that a token is written and not everything before it copied.

    `keys` and `values` are views (B, heads, T, head_dim) of the filled part of what is held.
    """

    is_initialized: bool
    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, heads, t, head_dim); returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        keys, values = self._make_room(key_states, value_states, start, end)
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _make_room(self, keys: Tensor, values: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        # what was reordered or selected lies elsewhere now; what was cropped still begins where it did
        if (
            self._room is not None
            and self._room[0].shape[2] >= end
            and len(self._room[0]) == len(keys)
            and (start == 0 or self.keys.data_ptr() == self._room[0].data_ptr())
        ):
            return self._room
        size = max(_FIRST_ROOM, 2 * start, end)
        room = tuple(new.new_empty((*new.shape[:2], size, new.shape[3])) for new in (keys, values))
        if start:
            room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
        self._room = room[0], room[1]
        return self._room

    def reset(self) -> None:
        """Forget everything."""
        # older versions of the base class keep as many tokens, of zeros
        self._room = self.keys = self.values = None
        self.is_initialized = False
        super().reset()


def grow_in_place(cache: Any) -> None:
    """Let the layers of a fresh cache that keep every token grow in place; others, as of a sliding window, stay."""
    if isinstance(cache, DynamicCache) and not cache.offloading:
        cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
            for layer in cache.layers
        ]
