"""Token ids in, text out: decoding options and a stream that can be stopped at any token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import Field

from lory.adapters.prompt import prompt_inputs, virtual_length
from lory.config import Section, build
from lory.runtime import LoryError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    repetition_penalty: float = Field(
        1.0, gt=0, description="Above 1 makes tokens that were seen less likely (CTRL's)."
    )
    no_repeat_ngram_size: int = Field(0, ge=0, description="No n-gram of this size comes twice; 0 is no limit.")
    seed: int | None = Field(None, description="Makes drawing repeatable.")


def default_options(model: PreTrainedModel) -> GenerationOptions:
    """The decoding options that the model's own generation_config.json sets.

    Raises:
        UsageError: one of them cannot be, such as a temperature of 0.
    """
    own = model.generation_config.to_diff_dict() if model.generation_config else {}
    values = {name: own[name] for name in GenerationOptions.model_fields if own.get(name) is not None}
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
        "repetition_penalty": options.repetition_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "eos_token_id": list(terminators),
        "pad_token_id": terminators[0],
        # a model's own generation_config.json must bring neither a second limit nor a search that cannot be streamed
        "max_length": None,
        "num_beams": 1,
    }
    # given without do_sample, these only bring warnings
    drawing = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return arguments | (drawing if options.do_sample else dict.fromkeys(drawing))


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


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    terminators: Sequence[int],
) -> Iterator[str]:
    """Yield the answer piece by piece as it is generated; closing the iterator stops the generation.

    Raises:
        LoryError: the generation failed; the sentence says how.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation import BaseStreamer

    stop = threading.Event()
    tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    arguments = generation_arguments(model, len(prompt_ids) + virtual_length(model), options, terminators)
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    failures: list[Exception] = []

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            # (1,) for an answer's token; the prompt, (1, T), comes first
            if value.ndim == 1 and int(value) not in terminators:
                tokens.put(int(value))

        def end(self) -> None:
            """`run` tells the reader, in whatever way the generation ends."""

    def run() -> None:
        try:
            if options.seed is not None:
                torch.manual_seed(options.seed)
            with torch.inference_mode():
                model.generate(
                    **prompt_inputs(model, input_ids),
                    streamer=Streamer(),
                    stopping_criteria=StoppingCriteriaList([Stopped()]),
                    **arguments,
                )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised again where the text is read
            failures.append(error)
        finally:
            # also after a failure, else the reader would wait for ever
            tokens.put(None)

    thread = threading.Thread(target=run, name="lory-generate", daemon=True)
    thread.start()
    try:
        yield from decode_pieces(tokenizer, iter(tokens.get, None))
    finally:
        stop.set()
        thread.join()
    if failures:
        raise LoryError(f"The answer could not be generated: {str(failures[0]).rstrip('.')}.") from failures[0]


def generate_ids(
    model: PreTrainedModel, prompt_ids: Sequence[int], options: GenerationOptions, terminators: Sequence[int]
) -> list[int]:
    """The ids of one answer, without the prompt and without the terminator."""
    if options.seed is not None:
        torch.manual_seed(options.seed)
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    arguments = generation_arguments(model, len(prompt_ids) + virtual_length(model), options, terminators)
    with torch.inference_mode():
        output = model.generate(**prompt_inputs(model, input_ids), **arguments)
    answer: list[int] = output[0, len(prompt_ids) :].tolist()
    return answer[:-1] if answer and answer[-1] in terminators else answer
