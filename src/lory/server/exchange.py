"""One request's way through the server: its jobs into the engine, their events out again, until one side goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lory.server.engine import Engine, Refused
from lory.server.errors import ApiError
from lory.server.jobs import Event, Failure, Job
from lory.server.replies import Reply

_DONE = b"data: [DONE]\n\n"


class Exchange:
    """The jobs of a request, and the events that the engine's thread delivers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()

    def deliver_to(self, number: int) -> Callable[[Event], None]:
        """What is to be told the events of the job of this number."""

        def deliver(event: Event) -> None:
            # a loop that is closed, which it tells so, has no clients left
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return deliver

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give the engine all of the jobs, or none.

        Raises:
            ApiError: it does not take them.
        """
        self._jobs = jobs
        for job in jobs:
            try:
                self._engine.submit(job)
            except Refused as error:
                self.cancel()
                raise ApiError(error.status, str(error)) from error

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self._jobs:
            self._engine.cancel(job)

    async def next(self) -> tuple[int, Event]:
        """The next event, and the number of its job."""
        return await self._events.get()


class ReplyResponse(Response):
    """Sends a reply as it comes about; whichever way it ends, the jobs end with it.

    The status is sent when the first event is there, since a request may yet fail in the queue.
    """

    def __init__(self, exchange: Exchange, reply: Reply, stream: bool, usage: bool) -> None:
        super().__init__()
        self._exchange, self._reply, self._stream, self._usage = exchange, reply, stream, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all, unless the client goes away first."""
        writer = asyncio.ensure_future(self._send(scope, receive, send))
        watcher = asyncio.ensure_future(_wait_for_end(receive))
        try:
            await asyncio.wait((writer, watcher), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            self._exchange.cancel()
            for task in (writer, watcher):
                task.cancel()
            await asyncio.gather(writer, watcher, return_exceptions=True)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await self._exchange.next()
        if isinstance(event := first[1], Failure):
            error = ApiError(event.status, event.message)
            await JSONResponse(error.to_dict(), error.status, error.headers)(scope, receive, send)
        elif self._stream:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self._write_chunks(first):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._send_whole(first, scope, receive, send)

    async def _send_whole(self, first: tuple[int, Event], scope: Scope, receive: Receive, send: Send) -> None:
        async for number, event in self._events(first):
            if isinstance(event, Failure):
                error = ApiError(event.status, event.message)
                await JSONResponse(error.to_dict(), error.status, error.headers)(scope, receive, send)
                return
            self._reply.take(number, event)
        await JSONResponse(self._reply.write())(scope, receive, send)

    async def _write_chunks(self, first: tuple[int, Event]) -> AsyncIterator[bytes]:
        for chunk in self._reply.open():
            yield _write_event(self._with_usage(chunk))
        async for number, event in self._events(first):
            if isinstance(event, Failure):
                yield _write_event(ApiError(event.status, event.message).to_dict())
                return
            for chunk in self._reply.take(number, event):
                yield _write_event(self._with_usage(chunk))
        if self._usage:
            yield _write_event(self._reply.write_usage())
        yield _DONE

    async def _events(self, first: tuple[int, Event]) -> AsyncIterator[tuple[int, Event]]:
        yield first
        while not self._reply.is_complete:
            yield await self._exchange.next()

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Where usage comes at the end, the other chunks say that theirs is null."""
        return {**chunk, "usage": None} if self._usage else chunk


def _write_event(value: dict[str, Any]) -> bytes:
    # in ASCII, since some clients take U+2028 and its like for the end of a line
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode()


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
