"""A web server on loopback for the tests of downloads: files with marks and ranges, redirects, and broken lines."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Site:
    """What the server has, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, Callable[[str, dict[str, str]], Answer]] = field(default_factory=dict)
    """Under a path (without its query), what answers instead: a function of the query and the headers."""
    break_after: list[int] = field(default_factory=list)
    """For each of the next answers, after how many bytes the line breaks."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each request."""
    url: str = ""

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        """Status, headers and body."""
        place, _, query = path.partition("?")
        if place in self.answers:
            return self.answers[place](query, headers)
        if place not in self.files:
            return 404, {}, b"not here"
        body = self.files[place]
        marks = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        wanted = headers.get("Range")
        if wanted and headers.get("If-Range") == marks["ETag"]:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
            return 206, {**marks, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, body[start:]
        return 200, marks, body


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """Serve the site on a free port while the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            site.asked.append((self.command, self.path, self.headers.get("Range")))
            status, headers, body = site.answer(self.path, dict(self.headers))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            cut = site.break_after.pop(0) if site.break_after else None
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            self.close_connection = True

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
