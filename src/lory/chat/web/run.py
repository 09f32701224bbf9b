"""The page as a process: who may reach it, what it may do in a browser, and its end on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lory.chat.web.desk import Desk
from lory.chat.web.page import STYLE, build_page, make_theme
from lory.runtime import LoryError, UsageError, is_loopback

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_WRONG_SECONDS = 1.0
"""What a wrong password costs; only one is looked at at a time."""
MOST_FILE_BYTES = "20mb"

# The browser itself sees to it that nothing comes from, or goes to, anywhere else, not even for a picture in an answer.
# gradio's own scripts stand in the page and make functions from texts.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Headers:
    """ASGI middleware that adds `HEADERS` to each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def check_access(host: str, share: bool, password: str) -> None:
    """Refuse a page that others can reach without a password.

    Raises:
        UsageError: others can reach it, and there is no password.
    """
    if password or (is_loopback(host) and not share):
        return
    what = "--share makes a public link" if share else f"--host {host} can be reached from other machines"
    raise UsageError(
        f"{what}, so a password is needed; give one with --password, or in the environment variable LORY_WEB_PASSWORD."
    )


def make_check(password: str) -> Callable[[str, str], Awaitable[bool]]:
    """Whether a visitor, of any name, gave the password; the comparison takes as long for any that is wrong."""
    busy = asyncio.Lock()

    async def check(user: str, given: str) -> bool:
        if hmac.compare_digest(given.encode(), password.encode()):
            return True
        async with busy:
            await asyncio.sleep(_WRONG_SECONDS)
        return False

    return check


@contextlib.contextmanager
def serve_page(
    desk: Desk, host: str = "127.0.0.1", port: int | None = None, password: str = "", share: bool = False
) -> Iterator[tuple[str, str | None]]:
    """Serve the page while the block runs; gives its address, and the public one if it is shared.

    Args:
        port: None takes the first free one from 7860.

    Raises:
        UsageError: others could reach it and there is no password, or the address can't be listened on.
        LoryError: there is no public link to be had.
    """
    check_access(host, share, password)
    names = None if password else [*_LOOPBACK_NAMES, host]
    middleware = [Middleware(Headers)]
    if names:
        # a page of another site that has made its own name mean this machine comes with that name
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
    with tempfile.TemporaryDirectory(prefix="lory-web-") as folder:
        # pictures that were uploaded; they live as long as the page does
        os.environ["GRADIO_TEMP_DIR"] = folder
        desk.keep_pictures_in(Path(folder))
        page = build_page(desk)
        page.queue(default_concurrency_limit=8, max_size=64)
        try:
            _, address, link = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=make_check(password) if password else None,
                auth_message="Any name will do; the password is the one this page was started with.",
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                max_file_size=MOST_FILE_BYTES,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
                theme=make_theme(),
                css_paths=[STYLE],
            )
        except OSError as error:
            raise UsageError(f"Could not listen on {host}:{port or 7860}; choose another --host or --port.") from error
        try:
            if share and not link:
                raise LoryError("The public link could not be made; check the network, or leave --share out.")
            yield address, link
        finally:
            page.close()


def run_page(
    desk: Desk, host: str, port: int | None, password: str, share: bool, ready: Callable[[str, str | None], None]
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        ready: told the address, and the public one if there is one, when the page can be opened.
    """
    with serve_page(desk, host, port, password, share) as (address, link):
        ready(address, link)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
