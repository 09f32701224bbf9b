"""The nouns that travel through lory: messages become conversations, conversations become samples of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)

IGNORE = -100
"""The label of a token that is not learnt, as torch's cross-entropy has it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def to_dict(self) -> dict[str, str]:
        """The form that chat templates and OpenAI's API take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record, whatever format it came in: either `messages`, or plain `text` to continue (pre-training style)."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    where: str = field(default="", compare=False)
    """File and line (or row) it was read from, for error messages."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the last answer."""
        return self.messages[:-1]


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation as tokens: `labels` has the token where it is learnt and `IGNORE` elsewhere (same length)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """How many of the tokens are learnt."""
        # the first token has nothing before it to be predicted from
        return sum(label != IGNORE for label in self.labels[1:])

    def __len__(self) -> int:
        return len(self.input_ids)
