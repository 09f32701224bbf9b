"""Images as a model sees them: what stands for them among the tokens, and the tensors of their pixels.

Both come from the model's own processor, asked in the same way in training, chat and server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.data.encoding.templates import render_text, tokenize
from lory.data.vision.images import ImageLimits, fit_size, open_image, shrink_image
from lory.runtime import UsageError, read_json, write_json
from lory.types import Media, Message

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

RESIZING_FILE = "image_resizing.json"
"""Beside a processor's files: how images are resized before it sees them."""

_VIDEOS = "video_preprocessor_config.json"
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
_STILL = "this model reads images, not {}s; take the {} out of the messages."


@dataclass(frozen=True, slots=True)
class Resizing:
    """How images are resized before the processor sees them (see `images.fit_size`); None: as the processor does."""

    max_pixels: int | None = None
    min_pixels: int | None = None
    size_factor: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.max_pixels, self.min_pixels, self.size_factor))


@dataclass(frozen=True)
class Prompt:
    """What a model is fed to answer messages."""

    ids: list[int]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """What else the model's first forward takes: the pixels of the images and, of (1, T) tokens, their kinds. Empty
    where there are no images."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Seen:
    """Some images after the processor."""

    marks: list[str]
    """For each image, the text that stands for it: as many placeholders as it has tokens, and what frames them."""
    inputs: dict[str, Tensor]
    """What the model takes of them, as its processor gives it."""


class ImageReader:
    """The image side of a model's processor.

    Attributes:
        mark: the token that stands for an image in rendered messages.
    """

    def __init__(self, processor: ProcessorMixin, resizing: Resizing | None = None) -> None:
        """`resizing` goes before what the processor's own settings say.

        Raises:
            UsageError: the processor has no mark for images.
        """
        self.processor, self.resizing = processor, resizing or Resizing()
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        mark = getattr(processor, "image_token", None)
        if not isinstance(mark, str):
            raise UsageError(f"{type(processor).__name__} has no token that stands for an image; it is not supported.")
        self.mark: str = mark
        self.bos = _find_bos(self.tokenizer)
        if self.resizing:
            self._set_bounds()

    @property
    def factor(self) -> int:
        """Sides of an image are made multiples of so many pixels, as far as that is known; else 1."""
        images = self.processor.image_processor
        return int(getattr(images, "patch_size", 1)) * int(images.merge_size) if _has_bounds(images) else 1

    def _set_bounds(self) -> None:
        """Let a processor that bounds the number of pixels agree with `resizing`, for other tools, too."""
        images = self.processor.image_processor
        if _has_bounds(images):
            given = {"longest_edge": self.resizing.max_pixels, "shortest_edge": self.resizing.min_pixels}
            size = dict(images.size) | {name: value for name, value in given.items() if value is not None}
            # a most below the processor's own least lowers that, too
            images.size = size | {"shortest_edge": min(size["shortest_edge"], size["longest_edge"])}

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The least and most pixels of an image, where the processor has such bounds and no fixed size."""
        images = self.processor.image_processor
        return (int(images.size["shortest_edge"]), int(images.size["longest_edge"])) if _has_bounds(images) else None

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The size that the processor gives an image of (height, width), where it has `bounds`."""
        assert self.bounds is not None
        return fit_size(height, width, self.bounds[1], self.bounds[0], self.factor)

    def resize(self, image: Image) -> Image:
        """The image in the size that `resizing` asks for."""
        if not self.resizing:
            return image
        least, most = self.bounds or (1, image.width * image.height)
        most = self.resizing.max_pixels or most
        least = self.resizing.min_pixels or min(least, most)
        return shrink_image(image, most, least, self.resizing.size_factor or self.factor)

    @property
    def token_id(self) -> int:
        """The token that stands for a part of an image."""
        return int(self.processor.image_token_id)

    def describe(self) -> str:
        """Everything that decides about tokens and pixels, as text."""
        settings = {name: value for name, value in self.processor.to_dict().items() if name != "chat_template"}
        return json.dumps([settings, astuple(self.resizing)], sort_keys=True, default=str)

    def see(self, images: Sequence[Image]) -> Seen:
        """What becomes of the images of one conversation, or of one packed row, in their order.

        Raises:
            UsageError: the processor refuses them.
        """
        if not images:
            return Seen([], {})
        try:
            found = self.processor(
                text=[self.mark * len(images)],
                images=[[self.resize(image) for image in images]],
                return_text_replacement_offsets=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images[:4])
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise UsageError(f"The model's processor refuses an image ({sizes} pixels): {reason}.") from error
        marks = [str(place["replacement"]) for place in found["text_replacement_offsets"][0]]
        return Seen(marks, {name: value for name, value in found.items() if name not in _TOKENS})

    def expand(self, text: str, marks: Sequence[str]) -> str:
        """Rendered messages with the placeholders of each image in the place of its mark, as the processor writes them.

        Raises:
            UsageError: there are more marks than images, or fewer, or a mark for a video beside them.
        """
        video = getattr(self.processor, "video_token", None)
        if marks and isinstance(video, str) and video != self.mark and video in text:
            # the model would look for the video that belongs to it
            raise UsageError(f"A text has the model's mark for a video ('{video}'); keep it out of texts.")
        parts = text.split(self.mark)
        if len(parts) - 1 != len(marks):
            raise UsageError(
                f"The rendered messages have {len(parts) - 1} marks for images ('{self.mark}'), and there are "
                f"{len(marks)} images; take a chat template that writes images, and keep the mark out of texts."
            )
        whole = parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:], strict=True))
        return whole if whole.startswith(self.bos) else self.bos + whole

    def kinds(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes of (1, T) tokens beside their ids: which of them are an image's."""
        import torch

        processor = self.processor
        if not processor.return_mm_token_type_ids:
            return {}
        name = "token_type_ids" if "token_type_ids" in processor.model_input_names else "mm_token_type_ids"
        name = "mm_token_type_ids" if "mm_token_type_ids" in processor.model_input_names else name
        return {name: torch.tensor(processor.create_mm_token_type_ids([list(ids)]))}

    def save(self, folder: Path, source: Path | None = None) -> None:
        """Write the processor's files into a folder beside the tokenizer's.

        Args:
            source: where it was loaded from; its settings for videos are kept.
        """
        values = {name: value for name, value in self.processor.to_dict().items() if value is not None}
        if source is not None and (source / "processor_config.json").exists():
            before = read_json(source / "processor_config.json")
            values |= {name: before[name] for name in ("video_processor", "feature_extractor") if name in before}
        write_json(folder / "processor_config.json", values)
        if source is not None and source != folder and (source / _VIDEOS).exists():
            shutil.copyfile(source / _VIDEOS, folder / _VIDEOS)
        if self.resizing:
            write_json(folder / RESIZING_FILE, asdict(self.resizing))


def read_resizing(folder: Path) -> Resizing:
    """How images were resized before they were learnt, as `ImageReader.save` wrote it."""
    path = folder / RESIZING_FILE
    return Resizing(**read_json(path)) if path.exists() else Resizing()


def _has_bounds(images: Any) -> bool:
    """Whether an image processor bounds the number of pixels, as Qwen2-VL's does, and not the sides."""
    size = getattr(images, "size", None) or {}
    return hasattr(images, "merge_size") and {"shortest_edge", "longest_edge"} <= set(dict(size))


def _find_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer writes before every text by itself, as processors let it; empty if nothing."""
    ids = tokenizer("")["input_ids"]
    starts = bool(ids) and ids[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if starts else ""


def check_marks(messages: Iterable[Message]) -> None:
    """Refuse messages whose texts have more marks than media, or fewer.

    Raises:
        UsageError: of the first such message.
    """
    for message in messages:
        for kind in ("image", "audio", "video"):
            given = sum(media.kind == kind for media in message.media)
            written = message.content.count(f"<{kind}>")
            if written != given:
                raise UsageError(
                    f"A message has {written} <{kind}> mark{'s' * (written != 1)} and {given} {kind}"
                    f"{'s' * (given != 1)}; write <{kind}> once where each belongs."
                )


def list_media(messages: Iterable[Message]) -> list[Media]:
    """The images of messages, in their order.

    Raises:
        UsageError: there are media of another kind among them.
    """
    found = [media for message in messages for media in message.media]
    if other := next((media.kind for media in found if media.kind != "image"), None):
        raise UsageError(f"A message has {other}s, but {_STILL.format(other, other)}")
    return found


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader | None,
    messages: Sequence[Message],
    tools: str = "",
    root: Path | None = None,
    limits: ImageLimits | None = None,
) -> Prompt:
    """What the model is fed to answer messages, images included: the same tokens as in training.

    Args:
        reader: of a model that sees; None for one that reads text only.
        tools: the functions that the assistant may call, as `Conversation.tools` has them.
        root: the folder that paths of images have to lie in; None: no paths at all.
        limits: what images may be opened.

    Raises:
        UsageError: the template refuses the messages, marks and images do not agree, an image cannot be opened, or
            there are images and the model reads text only.
    """
    media = list_media(messages)
    if reader is None:
        if media:
            raise UsageError(
                "An image was given, but this model reads text only; leave it out or take a model that sees."
            )
        return Prompt(tokenize(tokenizer, render_text(tokenizer, messages, for_answer=True, tools=tools)))
    # before any image is opened
    check_marks(messages)
    images = [open_image(item.source, root, limits or ImageLimits()) for item in media]
    return write_prompt(tokenizer, reader, messages, reader.see(images), tools)


def write_prompt(
    tokenizer: PreTrainedTokenizerBase, reader: ImageReader, messages: Sequence[Message], seen: Seen, tools: str = ""
) -> Prompt:
    """The second half of `make_prompt`: messages whose images the processor has seen.

    Raises:
        UsageError: the template refuses the messages, or marks and images do not agree.
    """
    check_marks(messages)
    text = render_text(tokenizer, messages, for_answer=True, tools=tools)
    ids = tokenize(tokenizer, reader.expand(text, seen.marks))
    return Prompt(ids, {**seen.inputs, **reader.kinds(ids)} if seen.marks else {})


def join_inputs(prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
    """The inputs of several prompts, padded on the left, for one batch.

    Raises:
        UsageError: the model's images cannot be batched, since their tensors differ in shape.
    """
    import torch

    longest = max(len(prompt.ids) for prompt in prompts)
    names = dict.fromkeys(name for prompt in prompts for name in prompt.inputs)
    joined: dict[str, Tensor] = {}
    for name in names:
        if name in _TOKENS:
            rows = [prompt.inputs.get(name, torch.zeros(1, len(prompt.ids), dtype=torch.long)) for prompt in prompts]
            padded = [torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows]
            joined[name] = torch.cat(padded)
            continue
        given = [prompt.inputs[name] for prompt in prompts if name in prompt.inputs]
        if len({tuple(value.shape[1:]) for value in given}) > 1:
            raise UsageError("Images of these sizes cannot be answered in one batch by this model; ask one by one.")
        joined[name] = torch.cat(given)
    return joined
