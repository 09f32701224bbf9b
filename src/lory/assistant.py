"""`lory.load(MODEL)`: a model with its adapter, its tokenizer, and a way to talk to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from lory.adapters import kinds
from lory.data.encoding.named_templates import add_answer_end
from lory.data.encoding.templates import render_prompt
from lory.generate import Ending, GenerationOptions, decode_text, default_options, generate_ids, stream_text
from lory.models.lean import prepare_for_decoding
from lory.models.load import DtypeName, default_device, load_config, load_model, load_tokenizer, terminators
from lory.models.quantize import Quantization, stored_quantization
from lory.models.resolve import resolve
from lory.runtime import UsageError, log
from lory.types import ROLES, Message, Role

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RETRY = "Answer without repeating yourself."
"""What is added to a question whose answer went round in circles, where `on_loop` is retry."""

Messages = str | Sequence[Mapping[str, str]]


class Assistant:
    """A model that answers messages.

    Attributes:
        model: the transformers model, adapter attached.
        tokenizer: the tokenizer, whose chat template renders every prompt.
        options: the model's own decoding options.
        terminators: token ids that end an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.options = default_options(model)
        self.terminators = add_answer_end(terminators(model.generation_config, tokenizer), tokenizer)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The tokens the model is fed to answer `messages`, the same as in training."""
        return render_prompt(self.tokenizer, parse_messages(messages))

    def stream(
        self, messages: Messages, options: GenerationOptions | None = None, ending: Ending | None = None
    ) -> Iterator[str]:
        """Yield the answer's text as it comes; closing the iterator stops the model.

        Args:
            ending: is told how the answer ended.
        """
        options, ending = options or self.options, ending or Ending()
        given = parse_messages(messages)
        if options.on_loop != "retry":
            yield from self._stream(given, options, ending)
            return
        text = "".join(self._stream(given, options, ending))
        if ending.reason == "retry":
            again = replace(given[-1], content=f"{given[-1].content}\n\n{RETRY}")
            text = "".join(self._stream([*given[:-1], again], options.model_copy(update={"on_loop": "stop"}), ending))
        yield text

    def _stream(self, messages: Sequence[Message], options: GenerationOptions, ending: Ending) -> Iterator[str]:
        prompt = render_prompt(self.tokenizer, messages)
        return stream_text(self.model, self.tokenizer, prompt, options, self.terminators, ending)

    def chat(self, messages: Messages, options: GenerationOptions | None = None) -> str:
        """The answer to `messages`: a question, or a list of ``{"role": ..., "content": ...}``."""
        return decode_text(self.tokenizer, self.answer_ids(messages, options))

    def answer_ids(self, messages: Messages, options: GenerationOptions | None = None) -> list[int]:
        """The answer as token ids, without its terminator."""
        return generate_ids(self.model, self.prompt_ids(messages), options or self.options, self.terminators)

    def generate(self, text: str, options: GenerationOptions | None = None) -> str:
        """What the model writes after `text`, which is fed as it is, without a chat template."""
        if not (ids := self.tokenizer(text)["input_ids"]):
            raise UsageError("An empty text was given; there is nothing to continue.")
        return decode_text(self.tokenizer, generate_ids(self.model, ids, options or self.options, self.terminators))


def parse_messages(messages: Messages) -> list[Message]:
    """OpenAI's message dicts, or a single question, as `Message`s.

    Raises:
        UsageError: a message lacks its role or content, or has an unknown role.
    """
    if isinstance(messages, str):
        return [Message("user", messages)]
    parsed = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UsageError(
                f"{dict(message)!r} was given; a message is {{'role': {'|'.join(ROLES)}, 'content': text}}."
            )
        parsed.append(Message(cast("Role", role), content))
    if not parsed:
        raise UsageError("No messages were given; there is nothing to answer.")
    return parsed


def load(
    model: str | Path,
    dtype: DtypeName = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    quantize: Quantization | None = None,
) -> Assistant:
    """Load a MODEL (a run, a checkpoint, an adapter or model folder, a hub id, `smollm2`) ready to chat.

    Args:
        dtype: precision of the base weights; auto is float32 on a CPU and bfloat16 on a GPU.
        quantize: hold the base's linear layers in few bits (nf4, nf4-pure or int8); int8 on a CPU also rounds the head,
            and is much faster.
        device: where it runs, such as `cpu` or `cuda:1`; by default the accelerator where there is one.

    Raises:
        UsageError: there is no such model, its files are broken, or there is no such device.
    """
    place = check_device(device) if device else None
    resolved = resolve(model)
    on_cpu = (place or default_device()).type == "cpu"
    # what bitsandbytes does with int8 on a CPU is made for training
    int8 = on_cpu and quantize == "int8" and not stored_quantization(load_config(resolved.base_path, trust_remote_code))
    loaded = load_model(resolved, dtype, place, trust_remote_code, None if int8 else quantize)
    if resolved.adapter:
        kinds.load(loaded, resolved.adapter)
    log.debug("%s", prepare_for_decoding(loaded, int8=int8))
    return Assistant(loaded, load_tokenizer(resolved, trust_remote_code), resolved.name)


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: there is no such device here.
    """
    try:
        # `item` finds out devices that hold no numbers, as meta
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"The device '{name}' cannot be used here: {reason}.") from error
    return torch.device(name)
