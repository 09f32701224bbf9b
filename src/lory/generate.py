"""Token ids in, text out: decoding options, streams that can be dropped at any token, and batches of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field

from lory.adapters.prompt import prompt_inputs, virtual_length
from lory.config import Section, build
from lory.data.vision.reader import Prompt, join_inputs
from lory.runtime import LoryError, UsageError

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

    from lory.decoding.guard import Loop
    from lory.decoding.loop import Step, Watcher
    from lory.decoding.policy import PolicyGuard

Counts = Literal["answer", "all"]
OnLoop = Literal["off", "report", "stop", "penalize", "back_up", "retry"]


class GenerationOptions(Section):
    """How an answer is decoded; the names are transformers' own."""

    max_new_tokens: int = Field(512, ge=1, description="Longest answer, in tokens.")
    do_sample: bool = Field(False, description="Draw tokens at random; otherwise the likeliest is taken (greedy).")
    temperature: float = Field(1.0, gt=0, description="Below 1 sharpens, above 1 flattens the distribution drawn from.")
    top_k: int = Field(50, ge=0, description="Draw from this many likeliest tokens; 0 is no limit.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that add up to this probability.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Draw from tokens at least this likely, relative to the likeliest."
    )
    typical_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the most typical tokens that add up to this probability (Meister's)."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Above 1 makes tokens that were seen less likely (CTRL's)."
    )
    repetition_window: int | None = Field(
        None, ge=1, description="Tokens back to which repetition_penalty looks; null: to the beginning."
    )
    repetition_counts: Counts = Field(
        "all", description="What repetition_penalty looks at: all, or the answer without the prompt."
    )
    frequency_penalty: float = Field(
        0.0, description="Taken from a token's logit each time that it stands in the answer (OpenAI's)."
    )
    presence_penalty: float = Field(0.0, description="Taken from a token's logit once it stands in the answer.")
    no_repeat_ngram_size: int = Field(0, ge=0, description="No n-gram of this size comes twice; 0 is no limit.")
    sampling_noise: float = Field(0.0, ge=0, description="Scale of Gumbel noise on the logits.")
    penalty_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Contrastive search over top_k candidates, and how much likeness to the text so far counts against "
        "them; 0.9 with top_k 4 is a good choice. null: none.",
    )
    num_beams: int = Field(
        1, ge=1, description="Beam search over so many beams, whose answer comes all at once; 1: none."
    )
    length_penalty: float = Field(1.0, description="Above 0 beam search prefers longer answers, below 0 shorter ones.")
    on_loop: OnLoop = Field(
        "off",
        description="What happens when an answer begins to go round in circles: off, report, stop, penalize (the loop "
        "gets less likely), back_up (to where it began, and on in another way) or retry (with a changed prompt).",
    )
    seed: int | None = Field(None, description="Makes drawing repeatable.")


Ids = Sequence[int] | Prompt
"""What is continued: token ids, or a `Prompt` with images."""


@dataclass
class Ending:
    """How an answer came to its end; filled in while it is generated."""

    reason: Literal["", "stop", "length", "repetition", "retry"] = ""
    """`stop`: the model ended it; `length`: it was cut; `repetition`: it went round in circles and was ended."""
    loops: list[Loop] = field(default_factory=list)
    """The loops that were noticed."""


def default_options(model: PreTrainedModel) -> GenerationOptions:
    """The decoding options that the model's own generation_config.json sets.

    Raises:
        UsageError: one of them cannot be, such as a temperature of 0.
    """
    own = model.generation_config.to_diff_dict() if model.generation_config else {}
    # an answer that comes all at once is for those who ask for it
    names = GenerationOptions.model_fields.keys() - {"num_beams", "length_penalty"}
    values = {name: own[name] for name in names if own.get(name) is not None}
    return build(GenerationOptions, values, f"generation_config.json of {model.name_or_path}")


def generation_arguments(
    model: PreTrainedModel, prompt_tokens: int, options: GenerationOptions, terminators: Sequence[int]
) -> dict[str, Any]:
    """The keyword arguments of `model.generate` that mean `options`, with the answer kept inside the context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = options.max_new_tokens if context is None else min(options.max_new_tokens, context - prompt_tokens)
    if room < 1:
        raise UsageError(f"The prompt has {prompt_tokens} tokens, but the model's context ends at {context}.")
    arguments: dict[str, Any] = {
        "max_new_tokens": room,
        "do_sample": options.do_sample,
        "repetition_penalty": 1.0 if _looks_closer(options) else options.repetition_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "eos_token_id": list(terminators),
        "pad_token_id": terminators[0],
        # a model's own generation_config.json must bring neither a second limit nor a search that cannot be streamed
        "max_length": None,
        "num_beams": options.num_beams,
    }
    if options.num_beams > 1:
        arguments["length_penalty"] = options.length_penalty
    # given without do_sample, these only bring warnings
    drawing = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")}
    return arguments | (drawing if options.do_sample else dict.fromkeys(drawing))


def _looks_closer(options: GenerationOptions) -> bool:
    """Whether the repetition penalty is one that transformers has not."""
    return options.repetition_window is not None or options.repetition_counts != "all"


def _own_processors(options: GenerationOptions, prompt_tokens: int) -> LogitsProcessorList:
    """The processors that transformers lacks; its own repetition penalty is left to it."""
    from lory.decoding.processors import build_processors

    changes: dict[str, Any] = {} if _looks_closer(options) else {"repetition_penalty": 1.0}
    return build_processors(options.model_copy(update=changes), prompt_tokens)


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer's tokens, marks such as an end of sequence left out and nothing else changed."""
    return cast("str", tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, in whole characters; joined it is `decode_text` of all of them."""
    ids: list[int] = []
    # ids[:end] were yielded; ids[start:end] are decoded once more, since many tokenizers drop a text's first space
    start = end = 0
    for token in tokens:
        ids.append(token)
        said, text = decode_text(tokenizer, ids[start:end]), decode_text(tokenizer, ids[start:])
        # the replacement character is a character whose other bytes are still to come
        if len(text) > len(said) and not text.endswith("\ufffd"):
            yield text[len(said) :]
            start, end = end, len(ids)
    if rest := decode_text(tokenizer, ids[start:])[len(decode_text(tokenizer, ids[start:end])) :]:
        yield rest


def stream_steps(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    terminators: Sequence[int],
    watch: Watcher | None = None,
    logprobs: int | None = None,
) -> Iterator[Step]:
    """Continue each of `prompts` (B of them, of any lengths), one token of each at a step, terminators included.

    Nothing runs but when a step is asked for, so dropping the iterator stops at once.

    Args:
        watch: sees each step before its token is chosen, and may stop a row, change the scores or go back.
        logprobs: give the new tokens' log-probabilities, and those of so many likeliest tokens.

    Raises:
        UsageError: a prompt is empty, or leaves no room in the model's context.
    """
    from lory.decoding.beam_search import beam_steps
    from lory.decoding.contrastive_search import contrastive_steps
    from lory.decoding.loop import decode_steps
    from lory.models.lean import find_decoder

    given = [prompt if isinstance(prompt, Prompt) else Prompt(list(prompt)) for prompt in prompts]
    if not given or not all(prompt.ids for prompt in given):
        raise UsageError("An empty prompt was given; there is nothing to continue.")
    length = max(len(prompt.ids) for prompt in given)
    arguments = generation_arguments(model, length + virtual_length(model), options, terminators)
    # on the left, so that the answers begin side by side
    rows = [[_pad(model, prompt.ids)] * (length - len(prompt.ids)) + prompt.ids for prompt in given]
    mask = [[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in given]
    input_ids, attention_mask = (torch.tensor(values, device=model.device) for values in (rows, mask))
    generator = None
    if options.seed is not None:
        # one of its own: other streams draw from others, and the global one stays as it is
        generator = torch.Generator(model.device).manual_seed(options.seed)
    with torch.inference_mode():
        inputs = prompt_inputs(model, input_ids, attention_mask)
    inputs |= {name: _place(value, model) for name, value in join_inputs(given).items()}
    if processors := _own_processors(options, inputs["input_ids"].shape[1]):
        arguments["logits_processor"] = processors
    search = _find_search(options)
    if search and any(prompt.inputs for prompt in given):
        raise UsageError(f"{search} is for texts; leave it out where there are images.")
    if search and (watch is not None or logprobs is not None):
        raise UsageError(f"{search} takes no guard against loops (set on_loop to off) and gives no log-probabilities.")
    if options.num_beams > 1:
        return beam_steps(model, inputs, arguments)
    if options.penalty_alpha is not None:
        return contrastive_steps(model, inputs, arguments, options.penalty_alpha, options.top_k, find_decoder(model))
    return decode_steps(model, inputs, arguments, generator, watch, logprobs, find_decoder(model))


def _find_search(options: GenerationOptions) -> str:
    """What is searched for rather than taken or drawn token by token, if anything is."""
    found = {
        "Contrastive search (penalty_alpha)": options.penalty_alpha is not None,
        "Beam search (num_beams)": options.num_beams > 1,
    }
    searches = [name for name, is_set in found.items() if is_set]
    if len(searches) > 1:
        raise UsageError("Both penalty_alpha and num_beams were given; choose one search.")
    if searches and options.do_sample:
        raise UsageError(f"{searches[0]} and do_sample were given; a search draws nothing.")
    return searches[0] if searches else ""


def _place(value: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _pad(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """What a prompt is padded with: its own first token, since penalties see through the mask, and count it anyway.

    (But no placeholder of an image, since there would be more of them than of the image's features.)
    """
    image = getattr(model.config, "image_token_id", None)
    return next((token for token in ids if token != image), ids[0])


def stream_ids(
    model: PreTrainedModel,
    prompt_ids: Ids,
    options: GenerationOptions,
    terminators: Sequence[int],
    guard: PolicyGuard | None = None,
    ending: Ending | None = None,
) -> Iterator[int]:
    """Yield the ids of one answer as they are generated, without the prompt and without the terminator.

    With a guard that takes tokens back, they come at the end, when none can be taken back any more.
    """
    held: list[int] = []
    holds = guard is not None and guard.policy in ("back_up", "retry")
    reason: Literal["stop", "length"] = "length"
    for step in stream_steps(model, [prompt_ids], options, terminators, guard):
        if step.back:
            del held[-step.back :]
            continue
        token = step.tokens[0]
        if token is None or token in terminators:
            reason = "length" if token is None else "stop"
            continue
        held.append(token)
        if not holds:
            yield held.pop()
    if ending is not None:
        ending.reason = guard.outcomes.get(0, reason) if guard is not None else reason
        ending.loops = guard.loops.get(0, []) if guard is not None else []
    yield from held


def make_guard(
    tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, options: GenerationOptions, terminators: Sequence[int]
) -> PolicyGuard | None:
    """The guard that `options.on_loop` asks for."""
    from lory.decoding.policy import PolicyGuard
    from lory.decoding.words import Words

    if options.on_loop == "off":
        return None
    return PolicyGuard(options.on_loop, prompt_tokens, Words(tokenizer), terminators, seed=options.seed or 0)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    options: GenerationOptions,
    terminators: Sequence[int],
    ending: Ending | None = None,
) -> Iterator[str]:
    """Yield the answer piece by piece as it is generated; closing the iterator stops the generation.

    Args:
        ending: is told how it ended.

    Raises:
        LoryError: the generation failed; the sentence says how.
    """
    failure: Exception | None = None
    guard = make_guard(tokenizer, len(prompt_ids), options, terminators)

    def tokens() -> Iterator[int]:
        nonlocal failure
        try:
            yield from stream_ids(model, prompt_ids, options, terminators, guard, ending)
        except (RuntimeError, ValueError, MemoryError) as error:
            # raised below, when all that was generated has been said
            failure = error

    yield from decode_pieces(tokenizer, tokens())
    if failure is not None:
        raise LoryError(f"The answer could not be generated: {str(failure).rstrip('.')}.") from failure


def generate_ids(
    model: PreTrainedModel, prompt_ids: Ids, options: GenerationOptions, terminators: Sequence[int]
) -> list[int]:
    """The ids of one answer, without the prompt and without the terminator."""
    return list(stream_ids(model, prompt_ids, options, terminators))


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    terminators: Sequence[int],
) -> list[list[int]]:
    """The ids of an answer to each of `prompts`; greedy, each is what it would be alone (up to rounding)."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream_steps(model, prompts, options, terminators):
        for answer, token in zip(answers, step.tokens, strict=True):
            if token is not None and token not in terminators:
                answer.append(token)
    return answers
