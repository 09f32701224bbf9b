"""From a request to the jobs that the engine is given: prompts as tokens, and how answers are decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lory.config import build
from lory.data.records.fields import Malformed
from lory.data.records.tools import read_tools
from lory.data.vision.reader import Prompt, Seen, make_prompt, write_prompt
from lory.generate import GenerationOptions
from lory.runtime import UsageError
from lory.server.catalogue import Served
from lory.server.errors import ApiError
from lory.server.jobs import Event, Job
from lory.server.limits import Limits
from lory.server.sampling import Sampling
from lory.server.schema import ChatMessage, ChatRequest, CompletionRequest, ImagePart, SamplingRequest, TextPart
from lory.types import Media, Message, Role, ToolCall

Deliver = Callable[[Event], None]

# Of contrastive search: each of its steps is a forward over so many tokens
_MOST_CANDIDATES = 64


def list_images(messages: list[ChatMessage]) -> list[str]:
    """Where the images of the messages are, in their order."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def read_messages(messages: list[ChatMessage]) -> list[Message]:
    """The messages as lory's, with marks where images are.

    Raises:
        ApiError: a call is no JSON object.
    """
    return [_read_message(message, f"messages.{number}") for number, message in enumerate(messages)]


def _read_message(message: ChatMessage, place: str) -> Message:
    parts = message.content if isinstance(message.content, list) else []
    text = message.content if isinstance(message.content, str) else "".join(map(_write_part, parts))
    role: Role = "system" if message.role == "developer" else message.role
    calls = tuple(
        ToolCall(call.function.name, _check_arguments(call.function.arguments, place), call.id)
        for call in message.tool_calls or ()
    )
    # what the template is told of an image; its pixels go another way
    media = tuple(Media("image", "image") for part in parts if isinstance(part, ImagePart))
    return Message(
        role,
        text,
        media,
        reasoning=message.reasoning_content or "",
        tool_calls=calls,
        name=message.name or "",
        tool_call_id=message.tool_call_id or "",
    )


def _write_part(part: TextPart | ImagePart) -> str:
    return "<image>" if isinstance(part, ImagePart) else part.text


def _check_arguments(arguments: str, place: str) -> str:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, "The arguments of a tool call are no JSON object.", f"{place}.tool_calls")
    return arguments or "{}"


def read_chat(request: ChatRequest, served: Served, limits: Limits, deliver: Deliver, seen: Seen | None = None) -> Job:
    """The job for a chat.

    Args:
        seen: the images; None: there are none.

    Raises:
        ApiError: the template refuses the messages, the prompt is too long, or an option is beyond the limits.
    """
    tools = "" if request.tool_choice == "none" else _read_tools(request.tools)
    messages = read_messages(request.messages)
    try:
        if served.reader is None:
            prompt = make_prompt(served.tokenizer, None, messages, tools)
        else:
            prompt = write_prompt(served.tokenizer, served.reader, messages, seen or Seen([], {}), tools)
    except UsageError as error:
        raise ApiError(400, str(error), "messages") from error
    wanted = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _build_job(request, served, limits, deliver, prompt, wanted, logprobs)


def _read_tools(tools: list[dict[str, Any]] | None) -> str:
    try:
        return read_tools(tools, "tools")
    except Malformed as error:
        raise ApiError(400, f"{str(error).rstrip('.')}.", "tools") from error


def read_completion(
    request: CompletionRequest, served: Served, limits: Limits, deliver: Callable[[int], Deliver]
) -> list[Job]:
    """A job for each prompt.

    Args:
        deliver: gives what is told the events of the job of this number.

    Raises:
        ApiError: a prompt is empty or too long, or an option is beyond the limits.
    """
    prompts = request.prompts
    if not 1 <= len(prompts) <= limits.prompts:
        raise ApiError(400, f"{len(prompts)} prompts were given; give 1 to {limits.prompts}.", "prompt")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens is 0, which only makes sense with echo.", "max_tokens")
    jobs = []
    for number, prompt in enumerate(prompts):
        ids = served.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        given = Prompt(list(ids))
        job = _build_job(request, served, limits, deliver(number), given, request.max_tokens, request.logprobs)
        job.prompt_logprobs = request.echo and request.logprobs is not None
        jobs.append(job)
    return jobs


def _build_job(
    request: SamplingRequest,
    served: Served,
    limits: Limits,
    deliver: Deliver,
    prompt: Prompt,
    wanted: int | None,
    logprobs: int | None,
) -> Job:
    vocabulary, context = served.vocabulary, served.context
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not prompt.ids:
        raise ApiError(400, "The prompt is empty; there is nothing to continue.", "prompt")
    if max(prompt.ids) >= vocabulary:
        raise ApiError(400, f"The prompt has a token above {vocabulary - 1}, the model's last.", "prompt")
    longest = min(context - min(1, wanted if wanted is not None else 1), limits.prompt_tokens or context)
    if len(prompt) > longest:
        message = f"The prompt has {len(prompt)} tokens; at most {longest} are taken."
        raise ApiError(400, message, field, "context_length_exceeded")
    if wanted is not None and wanted > limits.answer_tokens:
        message = f"max_tokens is {wanted}; this server takes at most {limits.answer_tokens}."
        raise ApiError(400, message, "max_tokens")
    if request.n > limits.largest_n:
        raise ApiError(400, f"n is {request.n}; this server takes at most {limits.largest_n}.", "n")
    options = _build_options(request, served.options)
    if options.penalty_alpha is not None and logprobs is not None:
        message = "logprobs are not given for contrastive search; leave them out, or set penalty_alpha to 0."
        raise ApiError(400, message, "logprobs")
    if options.penalty_alpha is not None and prompt.inputs:
        message = "Contrastive search is for texts; where there are images, set penalty_alpha to 0."
        raise ApiError(400, message, "penalty_alpha")
    room = options.max_new_tokens if wanted is None else wanted
    job = Job(
        prompt=prompt.ids,
        inputs=prompt.inputs,
        tokenizer=served.engine_tokenizer,
        terminators=served.terminators,
        sampling=Sampling(options, _read_bias(request.logit_bias, vocabulary)),
        answer_tokens=min(room, context - len(prompt), limits.answer_tokens),
        deliver=deliver,
        adapter=served.adapter,
        choices=request.n,
        stops=request.stops,
        logprobs=logprobs,
    )
    if request.seed is not None:
        job.seed = request.seed
    return job


def _build_options(request: SamplingRequest, own: GenerationOptions) -> GenerationOptions:
    """The request's options; what it leaves out is as the model's own, which `lory chat` takes, too."""
    values = own.model_dump()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if "temperature" in given:
        values["do_sample"] = given["temperature"] > 0
    elif request.n > 1 or given.keys() & {"top_p", "min_p"} or ("top_k" in given and not _wants_search(request, own)):
        values["do_sample"] = True
    if given.get("temperature") == 0:
        given.pop("temperature")
    values["on_loop"] = request.on_loop or own.on_loop
    if _wants_search(request, own) and (request.penalty_alpha or not values["do_sample"]):
        values |= {"penalty_alpha": request.penalty_alpha or own.penalty_alpha, "do_sample": False, "on_loop": "off"}
    else:
        values["penalty_alpha"] = None
    options = build(GenerationOptions, {**values, **given}, "The request")
    if options.penalty_alpha is not None and not 1 <= options.top_k <= _MOST_CANDIDATES:
        message = f"top_k is {options.top_k}; contrastive search goes over 1 to {_MOST_CANDIDATES} tokens."
        raise ApiError(400, message, "top_k")
    return options


def _wants_search(request: SamplingRequest, own: GenerationOptions) -> bool:
    """Whether the answer is to be found by contrastive search, unless tokens are drawn."""
    return bool(own.penalty_alpha if request.penalty_alpha is None else request.penalty_alpha)


def _read_bias(bias: dict[str, float] | None, vocabulary: int) -> dict[int, float]:
    read = {}
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocabulary):
            message = f"logit_bias has a key that is no token; tokens are 0 to {vocabulary - 1}."
            raise ApiError(400, message, "logit_bias")
        read[int(token)] = value
    return read
