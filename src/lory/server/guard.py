"""What every request passes before anything else: the host, the key, the kind and the size of its body."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lory.server.errors import ApiError
from lory.server.limits import Limits
from lory.server.metrics import ServerMetrics

_OPEN = ("/health",)
_KNOWN = ("/health", "/metrics", "/openapi.json", "/v1/models", "/v1/adapters", "/v1/completions")
_BODY_SECONDS = 60.0


class Guard:
    """ASGI middleware that refuses what must not get further, and counts all answers.

    Args:
        key: what a client has to bring as ``Authorization: Bearer KEY``; empty: nothing.
        hosts: names that requests may call the server by, without the port; None: any. A page in a browser that has
            made its own name mean this machine comes with that name.
        limits: of bodies, each and all of them together.
    """

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics, key: str, hosts: Collection[str] | None, limits: Limits
    ) -> None:
        self._app, self._metrics = app, metrics
        self._key, self._hosts, self._limits = key.encode(), hosts, limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(_name_path(scope["path"]), str(message["status"])).inc()
            await send(message)

        parts: list[bytes] = []
        try:
            self._check(scope)
            await self._read_body(scope, receive, parts)
            parts[:] = [b"".join(parts)]
            await self._app(scope, _replay(parts[0], receive), count_and_send)
        except ApiError as error:
            closes = error.status in (408, 413, 503)
            headers = {**error.headers, "Connection": "close"} if closes else error.headers
            await JSONResponse(error.to_dict(), error.status, headers)(scope, receive, count_and_send)
        finally:
            self._held -= sum(map(len, parts))

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name_host(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "This server is not known by the name in the Host header.", code="unknown_host")
        given = headers.get("authorization", "").encode()
        if self._key and scope["path"] not in _OPEN and not hmac.compare_digest(given, b"Bearer " + self._key):
            raise ApiError(401, "A valid API key is needed: send it as 'Authorization: Bearer KEY'.")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # other kinds are what a page of any site may post without being asked
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(400, "Content-Type is to be application/json.", code="unsupported_content_type")

    async def _read_body(self, scope: Scope, receive: Receive, parts: list[bytes]) -> None:
        """Read the whole body into `parts`."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limits.body_bytes:
            raise self._too_large()
        end = time.monotonic() + _BODY_SECONDS
        more = True
        try:
            while more:
                message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0))
                if message["type"] == "http.disconnect":
                    break
                parts.append(message.get("body", b""))
                self._held += len(parts[-1])
                more = message.get("more_body", False)
                if sum(map(len, parts)) > self._limits.body_bytes:
                    raise self._too_large()
                if self._held > self._limits.held_bytes:
                    raise ApiError(503, "The server holds too many large requests; try again later.")
        except asyncio.TimeoutError as error:
            raise ApiError(408, "The body did not come in time.", code="timeout") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._limits.body_bytes} bytes, the most that is taken.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """What a body that was read can be received from once more."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return rest.pop() if rest else await receive()

    return replay


def _name_host(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.partition(":")[0].lower()


def _name_path(path: str) -> str:
    """The path as a label; what clients make up does not make labels."""
    if path == "/v1/chat/completions":
        return path
    return next((known for known in _KNOWN if path == known or path.startswith(f"{known}/")), "other")
