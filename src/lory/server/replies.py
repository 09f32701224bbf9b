"""What the engine tells, written as OpenAI's API answers: whole, or in chunks."""

from __future__ import annotations

import functools
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lory.server.jobs import Job, Piece, PromptRead
from lory.server.text import ScoredToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Choice:
    """One answer as far as it is known."""

    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None


class Reply:
    """The answers to one request, of `jobs` with as many choices each, numbered through.

    Args:
        name: of the model, as the client gave it.
        tokenizer: writes the tokens in logprobs.
    """

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, name: str, jobs: Sequence[Job], tokenizer: PreTrainedTokenizerBase) -> None:
        self.jobs, self._tokenizer = jobs, tokenizer
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }
        self._choices = [_Choice() for job in jobs for _ in range(job.choices)]

    @property
    def is_complete(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.finish_reason for choice in self._choices)

    def take(self, job: int, event: PromptRead | Piece) -> list[dict[str, Any]]:
        """Note what was told of the job of this number; the chunks that a stream brings for it."""
        raise NotImplementedError

    def write(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._write_choice(number, choice) for number, choice in enumerate(self._choices)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def open(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""
        return []

    def write_usage(self) -> dict[str, Any]:
        """The chunk that counts the tokens."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens in and out so far; the ends of answers are among them."""
        prompt, answer = sum(len(job.prompt) for job in self.jobs), sum(job.tokens for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _write_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _note(self, job: int, piece: Piece) -> int:
        """Add a piece to its choice; returns the choice's number."""
        number = job * self.jobs[0].choices + piece.choice
        choice = self._choices[number]
        choice.text += piece.text
        choice.scored += piece.scored
        choice.finish_reason = piece.finish_reason
        return number

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def _name_token(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


def read_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> list[int] | None:
    """The bytes of a token, which may be a part of a character; None where its tokenizer does not tell."""
    if "\ufffd" not in text:
        return list(text.encode())
    name: str = tokenizer.convert_ids_to_tokens(token)
    if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return [int(match[1], 16)]
    letters = _byte_letters()
    return [letters[letter] for letter in name] if all(letter in letters for letter in name) else None


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


class ChatReply(Reply):
    """The answer to ``POST /v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def open(self) -> list[dict[str, Any]]:
        """A chunk with the role for each answer."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk({"index": number, "delta": delta, "logprobs": None, "finish_reason": None})
            for number in range(len(self._choices))
        ]

    def take(self, job: int, event: PromptRead | Piece) -> list[dict[str, Any]]:
        """As in `Reply`."""
        if isinstance(event, PromptRead):
            return []
        number = self._note(job, event)
        choice = {
            "index": number,
            "delta": {"content": event.text} if event.text or event.scored else {},
            "logprobs": self._write_logprobs(event.scored) if self.jobs[0].logprobs is not None else None,
            "finish_reason": event.finish_reason,
        }
        return [self._chunk(choice)]

    def _write_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._write_logprobs(choice.scored) if self.jobs[0].logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }

    def _write_logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            {
                **self._write_token(token.token, token.logprob or 0.0),
                "top_logprobs": [self._write_token(*top) for top in token.top],
            }
            for token in scored
        ]
        return {"content": content, "refusal": None}

    def _write_token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._name_token(token)
        # JSON has no infinity; this is what OpenAI writes for what cannot be
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": read_bytes(self._tokenizer, token, text)}


class TextReply(Reply):
    """The answer to ``POST /v1/completions``.

    Args:
        echoed: the prompts, which stand before each answer; None: they don't.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        name: str,
        jobs: Sequence[Job],
        tokenizer: PreTrainedTokenizerBase,
        echoed: Sequence[str | list[int]] | None = None,
    ) -> None:
        super().__init__(name, jobs, tokenizer)
        given = echoed or [""] * len(jobs)
        self._prompts: list[str] = [one if isinstance(one, str) else tokenizer.decode(one) for one in given]
        self._prompt_scored: list[tuple[ScoredToken, ...]] = [()] * len(jobs)
        self._opened: set[int] = set()

    def take(self, job: int, event: PromptRead | Piece) -> list[dict[str, Any]]:
        """As in `Reply`."""
        if isinstance(event, PromptRead):
            self._prompt_scored[job] = event.scored
            return []
        number = self._note(job, event)
        first = number not in self._opened
        self._opened.add(number)
        text, logprobs = self._write(job, event.text, event.scored, echo=first)
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": event.finish_reason}
        return [self._chunk(choice)]

    def _write_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        text, logprobs = self._write(number // self.jobs[0].choices, choice.text, choice.scored, echo=True)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _write(
        self, job: int, text: str, scored: Sequence[ScoredToken], echo: bool
    ) -> tuple[str, dict[str, Any] | None]:
        before = self._prompts[job] if echo else ""
        if self.jobs[0].logprobs is None:
            return before + text, None
        tokens, offsets = [], []
        place = 0
        for token in self._prompt_scored[job] if echo else ():
            tokens.append(token)
            offsets.append(place)
            place += len(self._name_token(token.token))
        tokens += scored
        offsets += [len(self._prompts[job]) + token.offset for token in scored]
        return before + text, {
            "tokens": [self._name_token(token.token) for token in tokens],
            "token_logprobs": [None if token.logprob is None else max(token.logprob, -9999.0) for token in tokens],
            "top_logprobs": [
                None
                if token.logprob is None
                else {self._name_token(other): max(logprob, -9999.0) for other, logprob in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }
