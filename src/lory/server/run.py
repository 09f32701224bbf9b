"""A server as a process: it listens, answers, and on a signal finishes what it has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from lory.runtime import UsageError, log
from lory.server.engine import Engine


class GracefulServer(uvicorn.Server):
    """Finishes running answers at the first signal, refusing new requests meanwhile; ends at once at the second.

    Args:
        ready: called when connections are taken.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: Callable[[int], None]) -> None:
        super().__init__(config)
        self._engine, self._ready = engine, ready
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """As uvicorn's, then tell the port."""
        await super().startup(sockets)  # type: ignore[arg-type]
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._ready(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; called on a signal."""
        if self._engine.is_healthy and self.started:
            self._engine.drain()
            log.info("Finishing %s", "running answers; send the signal again to stop at once.")
            self._loop.call_soon_threadsafe(self._begin_drain)
        else:
            self.should_exit = self.force_exit = True

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._wait_and_exit())

    async def _wait_and_exit(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._engine.limits.grace_seconds
        while not self._engine.is_idle and loop.time() < end:
            await asyncio.sleep(0.05)
        # what is left fails, and its clients are told
        await loop.run_in_executor(None, self._engine.close)
        self.should_exit = True


def run_server(app: ASGIApp, engine: Engine, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Serve until a signal comes.

    Args:
        port: 0 takes a free one.
        ready: told the port when connections are taken.

    Raises:
        UsageError: the address can't be listened on.
    """
    limits = engine.limits
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        # far more than can wait, so that these get their 429; each may hold a body
        limit_concurrency=4 * (limits.max_batch + limits.queue) + 256,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=65536,
    )
    engine.start()
    try:
        GracefulServer(config, engine, ready).run()
    except SystemExit as error:
        # uvicorn has logged why
        raise UsageError(f"Could not listen on {host}:{port}; choose another --host or --port.") from error
    finally:
        engine.close()
