"""What a server's engine is asked for, and what it tells of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lory.server.sampling import Sampling
from lory.server.text import ScoredToken

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The prompt was read; its tokens with their log-probabilities where these were asked for."""

    scored: tuple[ScoredToken, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of one of the answers."""

    choice: int
    text: str
    scored: tuple[ScoredToken, ...] = ()
    finish_reason: FinishReason | None = None
    """Why the answer ends with this piece; None: it goes on."""


@dataclass(frozen=True, slots=True)
class Failure:
    """There will be no more of any of the answers."""

    status: int
    """The HTTP status that fits."""
    message: str


Event = PromptRead | Piece | Failure


@dataclass(eq=False)
class Job:
    """One prompt and the answers to it.

    Attributes:
        prompt: its tokens, at least one.
        tokenizer: what turns the answers into text; used by the engine's thread alone.
        terminators: tokens that end an answer.
        sampling: how tokens are chosen.
        answer_tokens: the longest answer; 0: only the prompt is read.
        deliver: is told each event, in the engine's thread; it must not block.
        adapter: the number of its adapter in the bank.
        choices: how many answers there are.
        seed: of the first answer; those of the others follow it.
        stops: strings that end an answer.
        logprobs: give log-probabilities, and those of so many likeliest tokens.
        prompt_logprobs: give the prompt's, too.
        inputs: what the model is given beside the prompt's tokens, as the pixels of images.
        tokens: how many tokens the answers have so far, their ends included.
        cancelled: nobody listens any more.
    """

    prompt: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    terminators: frozenset[int]
    sampling: Sampling
    answer_tokens: int
    deliver: Callable[[Event], None]
    adapter: int | None = None
    choices: int = 1
    seed: int = field(default_factory=lambda: secrets.randbits(62))
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    cancelled: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    has_images: bool = field(init=False)
    """Whether the prompt has images; `inputs` is emptied when they have been read."""
    began_at: float | None = None
    """When its prompt was begun to be read."""

    def __post_init__(self) -> None:
        self.has_images = bool(self.inputs)
