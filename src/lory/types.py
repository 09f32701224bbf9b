"""The nouns that travel through lory: messages become conversations, conversations become samples of tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

MediaKind = Literal["image", "audio", "video"]
MEDIA_KINDS: tuple[str, ...] = get_args(MediaKind)
_MARKS = re.compile(r"<(image|audio|video)>")

IGNORE = -100
"""The label of a token that is not learnt, as torch's cross-entropy has it."""


@dataclass(frozen=True, slots=True)
class Media:
    """An image, a sound or a video inside a message."""

    kind: MediaKind
    source: str | bytes
    """A path, a URL, a data URL, or the file's bytes."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant asks to be called."""

    name: str
    arguments: str
    """A JSON object."""
    id: str = ""

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form, but with the arguments as an object, which is what chat templates write out."""
        call: dict[str, Any] = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"type": "function", "function": call} | ({"id": self.id} if self.id else {})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    """The text; where the message has `media`, the marks ``<image>``, ``<audio>`` and ``<video>`` say where each goes,
    in order, and there are as many marks as media."""
    media: tuple[Media, ...] = ()
    reasoning: str = ""
    """What the assistant thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    """The tool's name, in a message of the role `tool`."""
    tool_call_id: str = ""
    weight: float | None = None
    """How much the message's tokens count in the loss; None: as `data.loss_on` says."""

    def to_dict(self) -> dict[str, Any]:
        """The form that chat templates and OpenAI's API take; what a message does not have is left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.parts() if self.media else self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in optional.items() if value}

    def parts(self) -> list[dict[str, Any]]:
        """The content as a list of texts and media in their order, each ``{"type": kind, kind: value}``."""
        rest = iter(self.media)
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(_MARKS.split(self.content)):
            if number % 2:
                media = next(rest)
                parts.append({"type": media.kind, media.kind: media.source})
            elif piece:
                parts.append({"type": "text", "text": piece})
        return parts


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record, whatever format it came in: either `messages`, or plain `text` to continue (pre-training style)."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    text_pair: str = ""
    """The second text, in data for classification of pairs."""
    tools: str = ""
    """The functions that the assistant may call: a JSON array of JSON schemas, as OpenAI's API has it."""
    rejected: tuple[Message, ...] = ()
    """In a preference pair, what was worse in place of the last message."""
    label: str | None = None
    """The class of `text`, in data for classification; for a chat 'true' or 'false': whether its answer is wanted."""
    where: str = field(default="", compare=False)
    """File and line (or row) it was read from, for error messages."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the last answer."""
        return self.messages[:-1]


@dataclass(frozen=True, slots=True)
class SampleImage:
    """An image of a sample: where it is, not its pixels."""

    source: str | bytes
    """A path, a data URL, or the file's bytes."""
    digest: bytes
    """16 bytes that tell its pixels from others."""
    size: tuple[int, int] | None = None
    """Height and width that it was shrunk to, so that the sample fits; None: as large as the processor lets it be."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation as tokens: `labels` has the token where it is learnt and `IGNORE` elsewhere (same length)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    """How much each label counts in the loss (same length); None: 1 each."""
    images: tuple[SampleImage, ...] = ()
    """The images whose placeholders stand among the tokens, in their order."""

    @property
    def supervised(self) -> int:
        """How many of the tokens are learnt."""
        # the first token has nothing before it to be predicted from
        rest = self.labels[1:]
        return len(rest) - rest.count(IGNORE)

    def __len__(self) -> int:
        return len(self.input_ids)
