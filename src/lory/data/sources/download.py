"""Downloads: a file out of the web, fetched once, resumed where it broke off, and stored under its content's name."""

from __future__ import annotations

import hashlib
import http
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory.runtime import (
    LoryError,
    UsageError,
    cache_folder,
    explain_os_error,
    hash_file,
    lock_file,
    read_json,
    write_json,
)

SCHEMES = ("http", "https")
_URL_SIGNS = "%:/?#[]@!$&'()*+,;=~"
_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 30
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Download:
    """A file that was fetched, and the address that it finally came from."""

    path: Path
    url: str


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects that stay on the web, and on an encrypted line where they began on one."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in SCHEMES or (req.type == "https" and scheme != "https"):
            raise UsageError(
                f"{req.full_url} leads to {newurl}; a redirect from {req.type} to {scheme} is not followed."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_url(path: str) -> bool:
    """Whether a source's path is an address on the web."""
    return path.partition("://")[0].lower() in SCHEMES and "://" in path


def download(url: str, max_bytes: int) -> Download:
    """The file at `url`, out of lory's cache if it was fetched before.

    Raises:
        UsageError: the address is wrong, the server refuses, or the file is larger than `max_bytes`.
        LoryError: the network failed and nothing is in the cache; what came so far is kept and resumed.
    """
    folder = cache_folder() / "downloads"
    index = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    with lock_file(index.with_suffix(".lock"), wait=True):
        if index.exists():
            known = read_json(index)
            if (path := folder / known["file"]).exists():
                return Download(path, known["final_url"])
        part = index.with_suffix(".part")
        final_url = fetch(url, part, max_bytes)
        # by content, so that two addresses of one file are one file
        target = folder / hash_file(part)
        os.replace(part, target)
        write_json(index, {"url": url, "final_url": final_url, "file": target.name, "bytes": target.stat().st_size})
        return Download(target, final_url)


def fetch(url: str, part: Path, max_bytes: int, headers: Mapping[str, str] | None = None) -> str:
    """Fetch `url` into the file `part`, going on where an earlier try broke off; the address it finally came from.

    A broken file is only gone on with when the server says that its content is still the same; else it starts anew.
    """
    broken: Exception | None = None
    for _ in range(_TRIES):
        try:
            return _fetch_on(url, part, max_bytes, headers or {})
        except urllib.error.HTTPError as error:
            if error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                broken = error
                continue
            raise UsageError(f"{url} could not be downloaded: the server says {error.code} {error.reason}.") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            broken = error
        except OSError as error:
            raise explain_os_error(error, f"write {part}") from error
    reason = getattr(broken, "reason", None) or broken
    raise LoryError(
        f"{url} could not be downloaded: {reason}; check the address and the network, and run it again to go on."
    ) from broken


def _fetch_on(url: str, part: Path, max_bytes: int, headers: Mapping[str, str]) -> str:
    mark_file = part.with_suffix(".etag")
    have = part.stat().st_size if part.exists() and mark_file.exists() else 0
    request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_SIGNS), headers={"User-Agent": "lory"})
    for key, value in headers.items():
        request.add_unredirected_header(key, value)  # a token is for this server alone
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark_file.read_text(encoding="utf-8"))
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        response = opener.open(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        _forget(part)  # it was whole already, or is another file now
        return _fetch_on(url, part, max_bytes, headers)
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = have if resumed else 0
        _check_size(url, done + int(response.headers.get("Content-Length") or 0), max_bytes)
        part.parent.mkdir(parents=True, exist_ok=True)
        # only a strong mark says that the bytes are the same
        if (mark := response.headers.get("ETag")) and not mark.startswith("W/"):
            mark_file.write_text(mark, encoding="utf-8")
        else:
            mark_file.unlink(missing_ok=True)
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, url, done, max_bytes)
    mark_file.unlink(missing_ok=True)
    return response.url


def _copy(response: Any, file: Any, url: str, done: int, max_bytes: int) -> None:
    wanted = response.headers.get("Content-Length")
    received = 0
    while block := response.read(_BLOCK):
        received += len(block)
        _check_size(url, done + received, max_bytes)
        file.write(block)
    if wanted is not None and received < int(wanted):
        raise ConnectionError(f"it broke off after {done + received:,} of {done + int(wanted):,} bytes")


def _check_size(url: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise UsageError(f"{url} has more than {max_bytes:,} bytes; raise the source's 'max_bytes' if that is right.")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".etag").unlink(missing_ok=True)
