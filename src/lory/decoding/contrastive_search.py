"""Contrastive search: the likeliest tokens compete, and what resembles the text so far is marked down.

The method is that of Su et al., "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417), equation 5:

    v = argmax over v in V(k) of (1 - alpha) * p(v | x_<t) - alpha * max over j < t of cos(h_v, h_xj)

V(k) are the k likeliest tokens, h the last layer's hidden states. The k states h_v take a forward pass over k tokens,
whose winner brings the next step's probabilities along, so each token costs one forward pass.

    model.generate(**inputs, custom_generate=contrastive_search, penalty_alpha=0.9, top_k=4)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from lory.decoding.loop import Step
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation import BaseStreamer

# Chosen on SmolLM2, by seq-rep-4 of 100 tokens after prefixes of articles (benchmarks/contrastive.py). To it all tokens
# are so alike that a small alpha leaves a loop as it is: with 4 candidates, 0.6, 0.7 and 0.9 have 0.11, 0.07 and 0.01,
# greedy decoding 0.55. On prefixes that had no part in the choice 0.9 has 0.004. More candidates take more time.
PENALTY_ALPHA = 0.9
TOP_K = 4

# What a forward pass over k tokens at one position is given; a model that wants more takes the slower way
_PLAIN_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}
# Whether a model's candidates may share one sequence, as it was measured, by the attention it had then
_SHARES: WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = WeakKeyDictionary()


class Forward(Protocol):
    """A model's forward in two parts, such as `lory.models.lean.LeanDecoder`."""

    def run_body(self, input_ids: Tensor, position_ids: Tensor, visible: Tensor, past_key_values: Any) -> Tensor:
        """(B, T, H) last states of (B, T) ids, each of which sees what (B, 1, T, cached + T) `visible` says."""

    def run_head(self, states: Tensor) -> Tensor:
        """(B, V) logits of (B, H) states."""


class _Outputs(NamedTuple):
    """What `generate` looks at to move on."""

    logits: Tensor
    past_key_values: Any

    def __contains__(self, name: object) -> bool:
        return name in self._fields


@torch.no_grad()
def contrastive_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    penalty_alpha: float | None = None,
    top_k: int | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding method to give to `model.generate` as `custom_generate`.

    Args:
        input_ids: (B, T) padded on the left.
        penalty_alpha: weight of the likeness to the text so far, 0 to 1; 0 is greedy decoding. By default the
            generation config's own, else `PENALTY_ALPHA`.
        top_k: how many candidates compete; by default the generation config's beside its penalty_alpha, else `TOP_K`.
        streamer: transformers does not hand its own on to a `custom_generate`; bind it with `functools.partial`.

    Returns:
        (B, T + new) prompts and answers; finished rows are filled up with the padding token.

    Raises:
        UsageError: alpha or k cannot be, the model keeps no cache, or it is spread over several processes.
    """
    alpha, k = _check_options(penalty_alpha, top_k, generation_config)
    _check_model(model, model_kwargs, synced_gpus)
    step: tuple[Tensor, ...] = (input_ids,)
    for step in _decode(
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, alpha, k
    ):
        if streamer is not None:
            streamer.put(step[1].cpu())
    if streamer is not None:
        streamer.end()
    return step[0]


def contrastive_steps(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    penalty_alpha: float,
    top_k: int,
    forward: Forward | None = None,
) -> Iterator[Step]:
    """Contrastive search step by step, as `lory.decoding.loop.decode_steps` does other decoding.

    Args:
        inputs, arguments: as `decode_steps` takes them.
        forward: a faster way through the same model, for the candidates; None: the model's own.

    Raises:
        UsageError: alpha or k cannot be, or the model keeps no cache.
    """

    def start(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[Step]:
        alpha, k = _check_options(penalty_alpha, top_k, generation_config)
        _check_model(model, model_kwargs, synced_gpus=False)
        decoded = _decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, alpha, k, forward
        )
        return _tell(decoded)

    steps: Iterator[Step] = model.generate(**inputs, **arguments, custom_generate=start)
    return steps


def _tell(decoded: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Step]:
    running: list[bool] | None = None
    for _, tokens, unfinished in decoded:
        new: list[int | None] = list(tokens.tolist())
        if running is not None:
            new = [token if alive else None for token, alive in zip(new, running, strict=True)]
        running = unfinished.tolist()
        yield Step(new, finished=not any(running))


def _check_model(model: PreTrainedModel, model_kwargs: Mapping[str, Any], synced_gpus: bool) -> None:
    if model.config.is_encoder_decoder or not hasattr(model_kwargs.get("past_key_values"), "layers"):
        raise UsageError(
            f"Contrastive search needs a causal model that keeps a cache, and {type(model).__name__} was run without "
            "one; set use_cache to true or choose another way of decoding."
        )
    if synced_gpus:
        raise UsageError(
            "Contrastive search was asked of a model whose weights are spread over several processes; "
            "run it in one process, or choose another way of decoding."
        )


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    alpha: float,
    k: int,
    forward: Forward | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """After each step: all ids so far (B, T), the new tokens (B,), and which rows go on (B,)."""
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    padding = generation_config._pad_token_tensor
    with _watch_states(model) as watch:
        search = _Search(model, input_ids, model_kwargs, generation_config, watch, forward)
        while bool(unfinished.any()):
            scores = logits_processor(input_ids, search.logits.to(torch.float32, copy=True))
            tokens = search.step(input_ids, scores, alpha, k)
            if padding is not None:
                tokens = torch.where(unfinished, tokens, padding.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            yield input_ids, tokens, unfinished


def _check_options(alpha: float | None, k: int | None, config: GenerationConfig) -> tuple[float, int]:
    """The options that hold: those given, the generation config's, or the defaults."""
    if alpha is None and config.penalty_alpha is not None:
        alpha, k = config.penalty_alpha, config.top_k if k is None else k
    alpha, k = PENALTY_ALPHA if alpha is None else alpha, TOP_K if k is None else k
    if not 0 <= alpha <= 1:
        raise UsageError(f"penalty_alpha = {alpha} was given for contrastive search; give a number from 0 to 1.")
    if k < 1:
        raise UsageError(f"top_k = {k} was given for contrastive search; give 1 or more candidates.")
    return alpha, k


class _Watch:
    """Sees what goes from a model's body into its head, and may let only a part of it pass.

    Attributes:
        states: the last layer's, (B, T, H), of the last forward pass (`output_hidden_states` would keep every layer's).
        choose: given these states, the places (B,) among the B * T that are to have logits; None lets all pass.
        chosen: what `choose` said in the last forward pass; None where the head was not asked.
    """

    states: Tensor
    choose: Callable[[Tensor], Tensor] | None = None
    chosen: Tensor | None = None

    def leave_body(self, module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def enter_head(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.choose is None:
            return None
        states, *rest = arguments
        self.chosen = self.choose(self.states)
        return (states.flatten(0, 1)[self.chosen.to(states.device)][:, None], *rest)


@contextmanager
def _watch_states(model: PreTrainedModel) -> Iterator[_Watch]:
    """While the block runs, a `_Watch` stands between the model's body and head."""
    watch = _Watch()
    hooks = [model.get_decoder().register_forward_hook(watch.leave_body)]
    if (head := model.get_output_embeddings()) is not None:
        hooks.append(head.register_forward_pre_hook(watch.enter_head))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class _Search:
    """A batch of texts that grow: their cache, their states, and the logits of what comes next.

    Attributes:
        logits: (B, V) for the next position.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        arguments: dict[str, Any],
        config: GenerationConfig,
        watch: _Watch,
        forward: Forward | None,
    ) -> None:
        self.model, self.arguments, self.watch, self.forward = model, dict(arguments), watch, forward
        outputs = model._prefill(input_ids, config, self.arguments)
        self.logits: Tensor = outputs.logits[:, -1]
        self._advance(outputs)
        states = watch.states
        self.length = states.shape[1]
        # grows by doubling, so that a token's state is copied a constant number of times on average
        self.context = torch.zeros(
            len(states), 2 * self.length + 64, states.shape[2], dtype=torch.float32, device=states.device
        )
        self.context[:, : self.length] = F.normalize(states.float(), dim=-1)
        mask = self.arguments.get("attention_mask")
        self.padding = None
        if mask is not None:
            # the mask has a place for the next token, and may begin with virtual ones that have no state here
            self.padding = (mask[:, -1 - self.length : -1] == 0).to(states.device)

    @property
    def cache(self) -> Cache:
        return self.arguments["past_key_values"]

    def _advance(self, outputs: Any) -> None:
        """Make room for one more token in mask and positions, as `generate` does."""
        self.arguments = self.model._update_model_kwargs_for_generation(outputs, self.arguments)
        self.arguments.pop("inputs_embeds", None)

    def step(self, input_ids: Tensor, scores: Tensor, alpha: float, k: int) -> Tensor:
        """Choose the next token of each row, (B,), and move on by it.

        Args:
            input_ids: (B, T) so far.
            scores: (B, V) processed logits of the next position.
        """
        probabilities, candidates = F.softmax(scores, dim=-1).topk(min(k, scores.shape[-1]), dim=-1)
        shared = self._may_share(input_ids, candidates)
        rows, k = candidates.shape
        first = torch.arange(rows, device=candidates.device) * k
        if shared and self.forward is not None:
            return self._step_by(self.forward, probabilities, candidates, alpha)
        forward = _forward_shared if shared else _forward_repeated
        self.watch.chosen = None
        self.watch.choose = lambda states: first + self._judge(probabilities, states, alpha)
        try:
            outputs = forward(self.model, input_ids, candidates, self.arguments)
        finally:
            self.watch.choose = None
        logits, chosen = outputs.logits, self.watch.chosen
        if chosen is None:
            # a head of its own making, which has gone over all candidates
            chosen = first + self._judge(probabilities, self.watch.states, alpha)
            logits = logits.flatten(0, 1)[chosen][:, None]
        self.logits = logits[:, -1]
        self._append(self.watch.states.flatten(0, 1)[chosen.to(self.watch.states.device)])
        (_keep_shared if shared else _keep_repeated)(self.cache, chosen - first, k)
        self._advance(outputs)
        return candidates.flatten()[chosen]

    def _step_by(self, forward: Forward, probabilities: Tensor, candidates: Tensor, alpha: float) -> Tensor:
        """`step` through another forward than the model's own."""
        rows, k = candidates.shape
        positions = self.arguments["position_ids"][:, -1:].expand(rows, k)
        states = forward.run_body(candidates, positions, _see_own(candidates, self.arguments), self.cache)
        winners = self._judge(probabilities, states, alpha)
        chosen = torch.arange(rows, device=winners.device) * k + winners
        won = states.flatten(0, 1)[chosen]
        self.logits = forward.run_head(won)
        self._append(won)
        _keep_shared(self.cache, winners, k)
        self._advance(_Outputs(self.logits, self.cache))
        return candidates.flatten()[chosen]

    def _judge(self, probabilities: Tensor, states: Tensor, alpha: float) -> Tensor:
        """Equation 5: which of the k candidates wins, (B,).

        Args:
            probabilities: (B, k) of the candidates.
            states: their states, (B, k, H) or (B * k, 1, H).
        """
        directions = F.normalize(states.reshape(*probabilities.shape, -1).float(), dim=-1)
        likeness = torch.bmm(directions, self.context[:, : self.length].transpose(1, 2))
        if self.padding is not None:
            likeness[:, :, : self.padding.shape[1]].masked_fill_(self.padding[:, None], -torch.inf)
        values = (1 - alpha) * probabilities - alpha * likeness.amax(dim=-1).to(probabilities.device)
        # what a processor has forbidden stays so, however new it looks
        return values.masked_fill(probabilities == 0, -torch.inf).argmax(dim=-1)

    def _append(self, states: Tensor) -> None:
        """Add the next token's states, (B, H), to the text so far."""
        if self.length == self.context.shape[1]:
            self.context = torch.cat([self.context, torch.zeros_like(self.context)], dim=1)
        self.context[:, self.length] = F.normalize(states.float(), dim=-1)
        self.length += 1

    def _may_share(self, input_ids: Tensor, candidates: Tensor) -> bool:
        """Whether the candidates can be tokens of one sequence: measured once for each model and attention."""
        if not _can_share(self.arguments):
            return False
        known = _SHARES.setdefault(self.model, {})
        attention = str(self.model.config._attn_implementation)
        if attention not in known:
            known[attention] = _measure_sharing(self, input_ids, candidates)
        return known[attention]


def _can_share(arguments: dict[str, Any]) -> bool:
    """Whether cache and arguments are of the plain kind."""
    from transformers.cache_utils import DynamicLayer

    positions = arguments.get("position_ids")
    extra = {name for name, value in arguments.items() if value is not None} - _PLAIN_ARGUMENTS
    # a layer of another class keeps less than all keys, or more than keys
    plain = all(type(layer) is DynamicLayer for layer in arguments["past_key_values"].layers)
    return plain and not extra and positions is not None and positions.ndim == 2


def _measure_sharing(search: _Search, input_ids: Tensor, candidates: Tensor) -> bool:
    """Whether both ways give the same states; a model may place tokens otherwise, or build its mask by itself."""
    trial = search.arguments | {"past_key_values": copy.deepcopy(search.cache)}
    _forward_repeated(search.model, input_ids, candidates, trial)
    apart = search.watch.states.view(*candidates.shape, -1).float()
    trial = search.arguments | {"past_key_values": copy.deepcopy(search.cache)}
    try:
        _forward_shared(search.model, input_ids, candidates, trial)
    except (TypeError, ValueError, RuntimeError):
        # it does not take such a mask, which is the answer to the question
        return False
    limit = 1e-3 if search.watch.states.dtype == torch.float32 else 5e-2
    difference = (search.watch.states.float() - apart).norm(dim=-1) / apart.norm(dim=-1)
    return bool(difference.max() <= limit)


def _forward_shared(model: PreTrainedModel, input_ids: Tensor, candidates: Tensor, arguments: dict[str, Any]) -> Any:
    """One pass in which the k candidates are k tokens at one position, each seeing the text so far and itself.

    The cache, which is not copied, grows by k tokens. Logits are (B, k, V).
    """
    rows, k = candidates.shape
    visible = _see_own(candidates, arguments)
    if model.config._attn_implementation != "sdpa":
        # other functions add the mask to the scores
        lowest = torch.finfo(model.dtype).min
        visible = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill(~visible, lowest)
    return model(
        input_ids=candidates,
        attention_mask=visible,
        position_ids=arguments["position_ids"][:, -1:].expand(rows, k),
        past_key_values=arguments["past_key_values"],
        use_cache=True,
        return_dict=True,
    )


def _see_own(candidates: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """(B, 1, k, cached + k) bool: each candidate sees the text so far and itself."""
    rows, k = candidates.shape
    past = arguments["past_key_values"].get_seq_length()
    seen = torch.ones(rows, past, dtype=torch.bool, device=candidates.device)
    if arguments.get("attention_mask") is not None:
        seen = arguments["attention_mask"][:, :past].bool()
    own = torch.eye(k, dtype=torch.bool, device=candidates.device)
    return torch.cat([seen[:, None].expand(rows, k, past), own.expand(rows, k, k)], dim=2)[:, None]


def _keep_shared(cache: Cache, winners: Tensor, k: int) -> None:
    """Put each row's winner in the first of the last k places of the cache, and drop the others."""
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            end = states.shape[-2]
            places = winners.to(states.device) + end - k
            states[:, :, end - k] = states[torch.arange(len(places), device=states.device), :, places]
        layer.crop(1 - k)


def _forward_repeated(model: PreTrainedModel, input_ids: Tensor, candidates: Tensor, arguments: dict[str, Any]) -> Any:
    """One pass over B * k rows, for which the cache is copied k times; logits are (B * k, 1, V)."""
    rows, k = candidates.shape
    cache: Cache = arguments["past_key_values"]
    # unlike batch_repeat_interleave, every layer's class knows how to reorder, and repeating is a case of it
    cache.reorder_cache(torch.arange(rows, device=candidates.device).repeat_interleave(k))
    rest = {name: value for name, value in arguments.items() if name != "past_key_values"}
    ids, rest = model._expand_inputs_for_generation(expand_size=k, input_ids=input_ids, **rest)
    ids = torch.cat([ids, candidates.reshape(-1, 1)], dim=1)
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, past_key_values=cache, **rest)
    return model(**inputs, return_dict=True)


def _keep_repeated(cache: Cache, winners: Tensor, k: int) -> None:
    """Of B * k rows, keep each text's winner."""
    cache.reorder_cache(torch.arange(len(winners), device=winners.device) * k + winners)
