"""`lory.load(MODEL)`: a model with its adapter, its tokenizer, and a way to talk to it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lory.adapters import kinds
from lory.batch import answer_prompts
from lory.data.encoding.named_templates import add_answer_end
from lory.data.records.fields import Malformed, ReadOptions
from lory.data.records.media import read_parts
from lory.data.vision.images import ImageLimits
from lory.data.vision.reader import ImageReader, Prompt, make_prompt, read_resizing
from lory.generate import (
    Ending,
    GenerationOptions,
    decode_text,
    default_options,
    make_guard,
    stream_ids,
    stream_text,
)
from lory.models.lean import prepare_for_decoding
from lory.models.load import (
    DtypeName,
    default_device,
    find_processor_folder,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
    terminators,
)
from lory.models.quantize import Quantization, stored_quantization
from lory.models.resolve import Resolved, resolve
from lory.runtime import UsageError, log
from lory.types import ROLES, Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RETRY = "Answer without repeating yourself."
"""What is added to a question whose answer went round in circles, where `on_loop` is retry."""

Messages = str | Sequence[Mapping[str, Any] | Message]
"""A question, or messages: OpenAI's dicts, whose content is a text or a list of parts, or `Message`s.

A part is ``{"type": "text", "text": ...}`` or ``{"type": "image", "image": ...}`` with a path, a URL, a data URL, a
file's bytes or a PIL image; OpenAI's ``{"type": "image_url", "image_url": {"url": ...}}`` is understood, too.
"""


class Assistant:
    """A model that answers messages.

    Attributes:
        model: the transformers model, adapter attached.
        tokenizer: the tokenizer, whose chat template renders every prompt.
        options: the model's own decoding options.
        terminators: token ids that end an answer.
        reader: what prepares images; None where the model reads text only.
        image_root: the folder that paths of images have to lie in; None: no path is opened.
        image_limits: which images are opened; by default none from the web.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        reader: ImageReader | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.reader = model, tokenizer, name, reader
        # who calls this from Python may read any file
        self.image_root: Path | None = Path(Path.cwd().anchor)
        self.image_limits = ImageLimits()
        self.options = default_options(model)
        self.terminators = add_answer_end(terminators(model.generation_config, tokenizer), tokenizer)

    @property
    def sees_images(self) -> bool:
        """Whether messages may have images."""
        return self.reader is not None

    def prompt(self, messages: Messages, tools: str = "") -> Prompt:
        """What the model is fed to answer `messages`, the same as in training.

        Args:
            tools: the functions that may be called: a JSON array of JSON schemas, as OpenAI's API has it.

        Raises:
            UsageError: the messages cannot be rendered, an image cannot be opened, or there are images and the model
                reads text only.
        """
        given = parse_messages(messages)
        return make_prompt(self.tokenizer, self.reader, given, tools, self.image_root, self.image_limits)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The tokens of `prompt`."""
        return self.prompt(messages).ids

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
            text = "".join(self._stream(*_ask_otherwise(given, options), ending))
        yield text

    def _stream(self, messages: Sequence[Message], options: GenerationOptions, ending: Ending) -> Iterator[str]:
        prompt = self.prompt(messages)
        return stream_text(self.model, self.tokenizer, prompt, options, self.terminators, ending)

    def chat(self, messages: Messages, options: GenerationOptions | None = None) -> str:
        """The answer to `messages`: a question, or a list of ``{"role": ..., "content": ...}``."""
        return "".join(self.stream(messages, options))

    def chat_batch(
        self, conversations: Sequence[Messages], options: GenerationOptions | None = None, batch_size: int = 8
    ) -> list[str]:
        """The answers to several questions or conversations, `batch_size` of them at a time.

        Greedy, each is what `chat` gives for it alone, up to rounding.
        """
        options = options or self.options
        if options.on_loop == "retry":
            return ["".join(self.stream(messages, options)) for messages in conversations]
        prompts = (self.prompt(messages) for messages in conversations)
        answers = answer_prompts(self.model, self.tokenizer, prompts, options, self.terminators, batch_size)
        return [decode_text(self.tokenizer, answer.ids) for answer in answers]

    def answer_ids(self, messages: Messages, options: GenerationOptions | None = None) -> list[int]:
        """The answer as token ids, without its terminator."""
        options, given, ending = options or self.options, parse_messages(messages), Ending()
        ids = self._answer_ids(given, options, ending)
        return self._answer_ids(*_ask_otherwise(given, options), ending) if ending.reason == "retry" else ids

    def _answer_ids(self, messages: Sequence[Message], options: GenerationOptions, ending: Ending) -> list[int]:
        prompt = self.prompt(messages)
        guard = make_guard(self.tokenizer, len(prompt), options, self.terminators)
        return list(stream_ids(self.model, prompt, options, self.terminators, guard, ending))

    def generate(self, text: str, options: GenerationOptions | None = None) -> str:
        """What the model writes after `text`, which is fed as it is, without a chat template."""
        if not (ids := self.tokenizer(text)["input_ids"]):
            raise UsageError("An empty text was given; there is nothing to continue.")
        return "".join(stream_text(self.model, self.tokenizer, ids, options or self.options, self.terminators))


def _ask_otherwise(messages: Sequence[Message], options: GenerationOptions) -> tuple[list[Message], GenerationOptions]:
    """The question again, with what is asked of an answer whose first attempt went round in circles."""
    again = replace(messages[-1], content=f"{messages[-1].content}\n\n{RETRY}")
    return [*messages[:-1], again], options.model_copy(update={"on_loop": "stop"})


def parse_messages(messages: Messages) -> list[Message]:
    """What a caller gave as `Message`s (see `Messages`).

    Raises:
        UsageError: a message lacks its role or content, has an unknown role, or a part that is not understood.
    """
    if isinstance(messages, str):
        return [Message("user", messages)]
    if not messages:
        raise UsageError("No messages were given; there is nothing to answer.")
    return [message if isinstance(message, Message) else _parse_message(message) for message in messages]


def _parse_message(message: Mapping[str, Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str | list | tuple):
        raise UsageError(
            f"{dict(message)!r} was given; a message is {{'role': {'|'.join(ROLES)}, 'content': text or parts}}."
        )
    if isinstance(content, str):
        return Message(cast("Role", role), content)
    try:
        text, media = read_parts([_place_image(part) for part in content], "content", False, _ANY_PATH)
    except Malformed as error:
        raise UsageError(f"A message's content could not be read: {error}.") from error
    return Message(cast("Role", role), text, media)


# where paths may lead is checked when they are opened
_ANY_PATH = ReadOptions(media_root=Path.cwd().anchor)


def _place_image(part: Any) -> Any:
    """A content part whose image is what messages hold: an absolute path, or a file's bytes in place of a PIL image."""
    image = part.get("image") if isinstance(part, Mapping) else None
    if isinstance(image, Path) or (isinstance(image, str) and "://" not in image and image[:5].lower() != "data:"):
        return {**part, "image": str(Path(image).expanduser().absolute())} if str(image).strip() else part
    if image is None or not hasattr(image, "convert"):
        return part
    file = io.BytesIO()
    # PNG has no CMYK and the like
    (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(file, "PNG")
    return {**part, "image": file.getvalue()}


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
    tokenizer = load_tokenizer(resolved, trust_remote_code)
    return Assistant(loaded, tokenizer, resolved.name, load_reader(resolved, tokenizer, trust_remote_code))


def load_reader(
    resolved: Resolved, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> ImageReader | None:
    """What prepares images for a model, in the way in which it was trained; None for one that reads text only.

    Raises:
        UsageError: the model sees, but its processor's files are missing or broken.
    """
    processor = load_processor(resolved, tokenizer, trust_remote_code)
    return None if processor is None else ImageReader(processor, read_resizing(find_processor_folder(resolved)))


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
