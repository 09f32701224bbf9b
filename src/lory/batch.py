"""Answers to many prompts, several at a time; greedy, each is what it would be alone, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from lory.adapters.prompt import virtual_length
from lory.data.vision.reader import Prompt
from lory.generate import GenerationOptions, Ids, make_guard, stream_steps
from lory.runtime import LoryError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lory.decoding.guard import Loop
    from lory.decoding.loop import Watcher

WINDOW = 16
"""Batches among whose prompts those of about the same length are looked for."""

_PIXELS = 2**28
"""Bytes of images that are held beyond one batch."""

T = TypeVar("T")

_ALONE = ("back_up", "retry")
"""What a guard can do to one answer at a time only."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    ids: tuple[int, ...]
    """Without the terminator."""
    reason: Literal["stop", "length", "repetition", "retry"]
    """How it ended, as `lory.generate.Ending` has it."""
    loops: tuple[Loop, ...] = ()


def gather(items: Iterable[T], make: Callable[[T], Ids | None], batch_size: int) -> Iterator[list[tuple[T, Ids]]]:
    """Yield items with their prompts, so many at a time as are looked at together when batches are planned.

    Args:
        make: the prompt of an item; None leaves the item out. It is only called when the item's turn comes, since
            images take much memory.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size} was given; give 1 or more prompts to answer together.")
    window: list[tuple[T, Ids]] = []
    held = 0
    for item in items:
        prompt = make(item)
        if prompt is None:
            continue
        window.append((item, prompt))
        held += sum(value.nbytes for value in prompt.inputs.values()) if isinstance(prompt, Prompt) else 0
        if len(window) >= WINDOW * batch_size or (held > _PIXELS and len(window) >= batch_size):
            yield window
            window, held = [], 0
    if window:
        yield window


def plan_batches(
    model: PreTrainedModel, prompts: Sequence[Ids], options: GenerationOptions, batch_size: int
) -> list[list[int]]:
    """The places of `prompts` in batches of prompts that can be answered together, of about the same length.

    Apart are prompts whose answers the model's context would cut at different lengths, and images that the model takes
    in tensors of different shapes.
    """
    size = 1 if options.on_loop in _ALONE else batch_size
    groups: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault((_room(model, prompt, options), _shapes(prompt)), []).append(place)
    batches = []
    for places in groups.values():
        near = sorted(places, key=lambda place: len(prompts[place]))
        batches += [near[first : first + size] for first in range(0, len(near), size)]
    return batches


def _room(model: PreTrainedModel, prompt: Ids, options: GenerationOptions) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = options.max_new_tokens
    return most if context is None else min(most, context - virtual_length(model) - len(prompt))


def _shapes(prompt: Ids) -> Hashable:
    inputs = prompt.inputs if isinstance(prompt, Prompt) else {}
    # the first dimension is that of images or patches, which may be of any number; of tokens, it is padded
    return tuple((name, tuple(value.shape[1:])) for name, value in inputs.items() if not name.endswith("type_ids"))


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    terminators: Sequence[int],
    watch: Watcher | None = None,
    stopped: Callable[[], bool] | None = None,
) -> list[Answer] | None:
    """The answers to prompts, all at once; None if that was stopped.

    Args:
        watch: in place of the guard that `options.on_loop` asks for.
        stopped: asked at each token.

    Raises:
        UsageError: a prompt is empty, or leaves no room in the model's context.
        LoryError: the generation failed, as for want of memory.
    """
    guard = make_guard(tokenizer, max(map(len, prompts)), options, terminators) if watch is None else None
    ids: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    try:
        for step in stream_steps(model, prompts, options, terminators, watch or guard):
            for row, token in enumerate(step.tokens):
                if step.back:
                    del ids[row][-step.back :]
                elif token in terminators:
                    ended[row] = True
                elif token is not None:
                    ids[row].append(token)
            if stopped is not None and stopped():
                return None
    except (RuntimeError, ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise LoryError(
            f"The answers could not be generated: {reason}; fewer prompts at a time (batch size) take less memory."
        ) from error
    outcomes, loops = (guard.outcomes, guard.loops) if guard else ({}, {})
    return [
        Answer(tuple(own), outcomes.get(row, "stop" if ended[row] else "length"), tuple(loops.get(row, ())))
        for row, own in enumerate(ids)
    ]


def seeded(options: GenerationOptions, number: int) -> GenerationOptions:
    """The options with a seed of its own for a batch: equal prompts in different batches must not draw the same."""
    return options if options.seed is None else options.model_copy(update={"seed": options.seed + number})


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Ids],
    options: GenerationOptions,
    terminators: Sequence[int],
    batch_size: int = 8,
) -> Iterator[Answer]:
    """Yield an answer for each of `prompts`, in their order. Prompts are asked for as they are needed.

    Raises:
        UsageError: a prompt is empty, or leaves no room in the model's context.
        LoryError: the generation failed, as for want of memory.
    """
    first = 0
    for window in gather(prompts, lambda prompt: prompt, batch_size):
        given = [prompt for _, prompt in window]
        found: dict[int, Answer] = {}
        for places in plan_batches(model, given, options, batch_size):
            own = seeded(options, first + places[0])
            answers = answer_batch(model, tokenizer, [given[place] for place in places], own, terminators)
            found.update(zip(places, answers or (), strict=True))
        yield from (found[place] for place in range(len(window)))
        first += len(window)
