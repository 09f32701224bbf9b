"""Chat completions of any API that speaks OpenAI's protocol, with what can go wrong said in one sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lory.data.making.journal import Reply
from lory.runtime import LoryError, UsageError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_UNREADABLE_TRIES = 3
"""How often an answer that is no chat completion is asked for again."""

REFUSED = "refused"
"""The finish reason of a request that the API turned down by itself (400), such as for its content."""


@dataclass(frozen=True)
class Api:
    """Where chat completions come from, and how they are asked for."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    """Empty: the API wants none."""
    temperature: float = 1.0
    max_tokens: int = 1024
    timeout_seconds: float = 120.0
    retries: int = 8
    """How often a call is made again after 408, 409, 429, 5xx, a timeout or a broken connection."""


class Client:
    """Asks an API; to be used inside of one event loop.

    Attributes:
        answered: whether it ever gave an answer: then a single 400 is about that request alone.
    """

    def __init__(self, api: Api) -> None:
        """Raises `UsageError` when the package openai is missing."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise UsageError("This needs the package openai; install it: pip install 'lory-llm[generate]'.") from error
        self.api = api
        self.answered = False
        # the client wants some key, also where the server wants none
        self._openai: AsyncOpenAI = AsyncOpenAI(
            api_key=api.key or "none", base_url=api.url, timeout=api.timeout_seconds, max_retries=api.retries
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The API's answer.

        Retries are the official client's: with growing pauses, or as long as the server says in Retry-After.

        Raises:
            UsageError: the API refuses the key, the model or the request as such.
            LoryError: it did not answer, however often it was asked.
        """
        import openai

        api = self.api
        try:
            for _ in range(_UNREADABLE_TRIES):
                raw = await self._openai.chat.completions.with_raw_response.create(
                    model=api.model,
                    messages=list(messages),  # type: ignore[arg-type]
                    temperature=api.temperature,
                    max_tokens=api.max_tokens,
                )
                if (reply := read_completion(raw.text)) is not None:
                    self.answered = True
                    return reply
                await asyncio.sleep(0.2)
        except openai.APIStatusError as error:
            if error.status_code in (400, 422) and self.answered:
                return Reply("", REFUSED)
            raise self._explain(error) from None  # its cause may hold the key
        except openai.APIConnectionError as error:
            what = "did not answer in time" if isinstance(error, openai.APITimeoutError) else "cannot be reached"
            raise LoryError(f"{api.url} {what} ({api.retries + 1} tries).") from None
        raise LoryError(
            f"{api.url} gave {_UNREADABLE_TRIES} answers that are no chat completions; is it OpenAI's protocol?"
        )

    def _explain(self, error: APIStatusError) -> LoryError:
        api, code = self.api, error.status_code
        sentences = {
            401: "does not accept the key; set the environment variable that holds it",
            403: f"forbids this key to use '{api.model}'; use another model or key",
            404: f"knows no '{api.model}', or is no API; its address should end as in /v1",
        }
        if code in sentences:
            return UsageError(f"{api.url} {sentences[code]} ({code}).")
        said = _read_message(error.body)
        if api.key:
            said = said.replace(api.key, "***")
        if code < 500 and code not in (408, 409, 429):
            return UsageError(f"{api.url} refuses the request ({code}): {said}")
        wait = error.response.headers.get("retry-after")
        later = f"; it asks to wait {wait} seconds" if wait else ""
        return LoryError(f"{api.url} failed {api.retries + 1} times ({code}): {said}{later}.")


def read_completion(text: str) -> Reply | None:
    """The reply in the body of an answer; None if it is no chat completion."""
    try:
        value = json.loads(text)
        choice = value["choices"][0]
        content = choice["message"].get("content") or ""
        usage = value.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return Reply(content, str(choice.get("finish_reason") or "stop"), *counts) if isinstance(content, str) else None


def _read_message(body: Any) -> str:
    """What the server says is wrong, in one line."""
    found = body.get("message", body) if isinstance(body, dict) else body
    return " ".join(str(found).split())[:200].rstrip(".")
