"""Images from anywhere: a path, a data URL, bytes or the web, opened without trusting any of them.

Whoever wrote a record or a request chooses what is opened here, so nothing is read outside of a folder, no address in a
private network is called, and an image's size is known before its pixels are unpacked.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http
import http.client
import io
import ipaddress
import math
import os
import re
import socket
import ssl
import stat
import struct
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lory.runtime import UsageError, log

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""What is taken for an image; others of Pillow's readers start programs or are seldom tried."""
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on damaged files."""
_FRAMES = ("GIF", "PNG", "WEBP", "TIFF")
"""Formats whose further frames are more than a preview of the first."""
_SVG = re.compile(rb"(\xef\xbb\xbf)?\s*(<[?!][^>]*>\s*)*<svg[\s/>]", re.IGNORECASE)
_DATA_URL = re.compile(r"data:([\w.+/-]*)(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_URL_SIGNS = "%/:=&?~+!$,;'@()*[]"
_BLOCK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_STEEPEST = 200
"""The longest side over the shortest one, as Qwen2-VL has it."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What may be opened."""

    max_pixels: int = 50_000_000
    """Width times height, checked before decoding."""
    max_bytes: int = 50_000_000
    """Of the file."""
    allow_urls: bool = False
    """Whether http and https addresses are fetched; without the proxies that the environment names."""
    private_hosts: frozenset[str] = frozenset()
    """Names of servers that may have an address in a private network, on this machine, or the like."""
    timeout_seconds: float = 10.0
    """For a whole fetch, redirects included (looking up a name is as slow as the system lets it be)."""


_LIMITS = ImageLimits()


def open_image(source: str | bytes | Image, root: Path | None, limits: ImageLimits = _LIMITS) -> Image:
    """The image as RGB, upright, on white where it is transparent; of an animation, the first frame.

    Args:
        source: a path (a relative one starts at the working directory, as in `lory.types.Media`), a data URL, an
            http(s) URL, a file's bytes, or an image.
        root: the folder that paths have to lie in when all symbolic links are followed; None: no paths at all.

    Raises:
        UsageError: it is not there, not allowed, too large, damaged, or of no format that is known here.
    """
    if isinstance(source, bytes):
        return _decode(source, f"The image of {len(source):,} bytes", limits)
    if not isinstance(source, str):
        return _convert(source, f"The image of {source.width:,} x {source.height:,} pixels", limits)
    name = f"The image '{_shorten(source)}'"
    start = source[:8].lower()
    if start.startswith("data:"):
        return _decode(_read_data_url(source, name, limits), name, limits)
    if start.startswith(("http://", "https://")):
        return _decode(_fetch(source, name, limits), name, limits)
    if "://" in source or start.startswith("file:"):
        raise UsageError(f"{name} is at an address of another kind; give a path, a data URL or an http(s) URL.")
    return _decode(_read_file(source, name, root, limits), name, limits)


def _shorten(source: str) -> str:
    text = source if len(source) <= 90 else f"{source[:60]}…{source[-20:]}"
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _read_data_url(source: str, name: str, limits: ImageLimits) -> bytes:
    start = _DATA_URL.match(source)
    if not start:
        raise UsageError(f"{name} is a data URL of another kind than data:image/...;base64,...; write it as that.")
    kind = start[1].lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise UsageError(f"{name} is a data URL of the type {kind}, but an image is expected.")
    _check_bytes((len(source) - start.end()) * 3 // 4 - 2, name, limits)
    try:
        return base64.b64decode(source[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{name} is a data URL whose base64 is broken: {error}.") from error


def _read_file(source: str, name: str, root: Path | None, limits: ImageLimits) -> bytes:
    if root is None:
        raise UsageError(f"{name} is a path, and files are not opened here; give a data URL.")
    try:
        # where it leads is looked at before whether it is there: nothing is told of files elsewhere
        path = Path(source).resolve()
        if not path.is_relative_to(root.resolve()):
            raise UsageError(f"{name} leads out of the folder {root}; move it there, or name a folder above both.")
        return _read_regular(path, name, limits)
    except FileNotFoundError as error:
        raise UsageError(f"{name} does not exist; paths start at {Path.cwd()}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name} could not be read: {reason}.") from error


def _read_regular(path: Path, name: str, limits: ImageLimits) -> bytes:
    # a link put there in the meantime is not followed, and a pipe does not block
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{name} is no file; give the path of an image.")
        _check_bytes(status.st_size, name, limits)
        with open(handle, "rb", closefd=False) as file:
            return file.read(limits.max_bytes)
    finally:
        os.close(handle)


def _check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise UsageError(f"{name} has more than {limits.max_bytes:,} bytes, which is the limit; make it smaller.")


def _decode(data: bytes, name: str, limits: ImageLimits) -> Image:
    """The image in a file's bytes."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UsageError(f"{name} has zero bytes; it may not have been written or fetched to its end.")
    _check_bytes(len(data), name, limits)
    if _SVG.match(data[:4096]):
        raise UsageError(f"{name} is SVG, a drawing without pixels; convert it to PNG.")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.format in _FRAMES and getattr(image, "is_animated", False):
            log.info(f"{name} has several frames; the first is taken.")
    except UnidentifiedImageError as error:
        known = ", ".join(_FORMATS)
        raise UsageError(f"{name} is none of the known formats ({known}), or is damaged at its start.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(
            f"{name} has far more pixels than the limit of {limits.max_pixels:,}; make it smaller."
        ) from error
    except _BROKEN as error:
        raise _explain_damage(name, error) from error
    return _convert(image, name, limits)


def _explain_damage(name: str, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return UsageError(f"{name} is truncated or damaged: {reason}; save or fetch it anew.")


def _convert(image: Image, name: str, limits: ImageLimits) -> Image:
    """The image as RGB; only here are its pixels unpacked."""
    from PIL import ImageOps

    if image.width * image.height > limits.max_pixels:
        size = f"{image.width:,} x {image.height:,}"
        raise UsageError(f"{name} has {size} pixels, more than the limit of {limits.max_pixels:,}; make it smaller.")
    if image.mode == "F":
        raise UsageError(f"{name} has floating-point pixels, whose range is not known; save it with 8 or 16 bits.")
    try:
        upright = ImageOps.exif_transpose(image)
        return _convert_wide(upright) if upright.mode.startswith("I") else _convert_narrow(upright)
    except _BROKEN as error:
        raise _explain_damage(name, error) from error


def _convert_narrow(image: Image) -> Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    from PIL import Image as pillow

    white = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _convert_wide(image: Image) -> Image:
    """Shades of grey of 16 bits, which Pillow itself would cut off at 255."""
    import numpy as np
    from PIL import Image as pillow

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("it has shades of grey beyond 16 bits")
    grey = np.rint(values / 257).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return pillow.fromarray(grey).convert("RGB")


def _fetch(url: str, name: str, limits: ImageLimits) -> bytes:
    """The file at a web address, each hop of which is checked."""
    if not limits.allow_urls:
        raise UsageError(f"{name} is on the web, and nothing is fetched here; give a data URL.")
    deadline = time.monotonic() + limits.timeout_seconds
    try:
        for _ in range(_MOST_REDIRECTS + 1):
            found = _get(url, name, limits, deadline)
            if isinstance(found, bytes):
                return found
            target = urllib.parse.urljoin(url, found)
            scheme = urllib.parse.urlsplit(target).scheme
            if scheme not in ("http", "https") or (scheme == "http" and url.lower().startswith("https:")):
                raise UsageError(f"{name} leads to '{_shorten(target)}'; such a redirect is not followed.")
            url = target
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = f"it took longer than {limits.timeout_seconds:g} seconds" if time.monotonic() >= deadline else ""
        raise UsageError(f"{name} could not be fetched: {late or error or type(error).__name__}.") from error
    raise UsageError(f"{name} could not be fetched: it leads to more than {_MOST_REDIRECTS} addresses in a row.")


def _get(url: str, name: str, limits: ImageLimits, deadline: float) -> bytes | str:
    """The content at an address, or the address that it leads to."""
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    addresses = _look_up(host, port, name, limits)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    with _connect(addresses, host if secure else None, deadline) as connection.sock:
        target = urllib.parse.quote(urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), _URL_SIGNS)
        connection.request("GET", target, headers={"User-Agent": "lory", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.headers.get("Location")):
            return location
        if response.status != http.HTTPStatus.OK:
            raise UsageError(f"{name} could not be fetched: the server says {response.status} {response.reason}.")
        data = _read_body(response, name, limits)
    if time.monotonic() >= deadline:
        raise TimeoutError  # what was read ended because the line was cut
    return data


def _read_body(response: http.client.HTTPResponse, name: str, limits: ImageLimits) -> bytes:
    wanted = int(response.headers.get("Content-Length") or 0)
    _check_bytes(wanted, name, limits)
    blocks, size = [], 0
    while block := response.read(_BLOCK):
        size += len(block)
        _check_bytes(size, name, limits)
        blocks.append(block)
    if size < wanted:
        raise ConnectionError(f"it broke off after {size:,} of {wanted:,} bytes")
    return b"".join(blocks)


def _look_up(host: str, port: int, name: str, limits: ImageLimits) -> list[tuple[str, int]]:
    """The addresses of a server; one in a private network is refused, and so is a server that has such a one, too."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(place[0]) for *_, place in found]
    if host not in limits.private_hosts and not all(map(is_public, addresses)):
        raise UsageError(f"{name} is on the server '{host}', which is not on the public net; nothing is fetched there.")
    return [(address, port) for address in addresses]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public net: not private, loopback, link-local, reserved or multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # addresses that stand for one of IPv4
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


@contextlib.contextmanager
def _connect(addresses: list[tuple[str, int]], secure_host: str | None, deadline: float) -> Iterator[socket.socket]:
    """A line to the first of the addresses that answers, cut at the deadline whatever the other side does.

    The checked addresses are called, not the name, which by now might stand for another one.
    """
    line: socket.socket | None = None
    for number, address in enumerate(addresses, 1):
        try:
            line = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.01))
            break
        except OSError:
            if number == len(addresses):
                raise
    assert line is not None
    if secure_host:
        line = ssl.create_default_context().wrap_socket(
            line, server_hostname=secure_host, do_handshake_on_connect=False
        )
    # a timeout of the socket is for each piece alone, and pieces can come slowly for ever
    timer = threading.Timer(max(deadline - time.monotonic(), 0), _cut, [line])
    timer.daemon = True
    timer.start()
    try:
        if isinstance(line, ssl.SSLSocket):
            line.do_handshake()
        yield line
    finally:
        timer.cancel()
        line.close()


def _cut(line: socket.socket) -> None:
    # it may have been closed just now
    with contextlib.suppress(OSError):
        socket.socket.shutdown(line, socket.SHUT_RDWR)


def fit_size(height: int, width: int, max_pixels: int, min_pixels: int, size_factor: int = 28) -> tuple[int, int]:
    """Height and width to shrink or enlarge an image to: multiples of `size_factor` with between `min_pixels` and
    `max_pixels` pixels, and the aspect ratio as near as that allows.

    The rule is Qwen2-VL's (`smart_resize` in its image processor).

    Raises:
        UsageError: one side is more than 200 times the other, or no such size fits the bounds.
    """
    if size_factor < 1 or not size_factor**2 <= max_pixels >= min_pixels >= 1:
        raise UsageError(
            f"Between {min_pixels:,} and {max_pixels:,} pixels in multiples of {size_factor} were asked for; give at "
            f"least 1 and at most so many that a square of {size_factor} x {size_factor} fits."
        )
    if max(height, width) > _STEEPEST * min(height, width):
        raise UsageError(
            f"An image of {width:,} x {height:,} pixels has one side more than {_STEEPEST} times the other; crop it."
        )
    rows, columns = (round(side / size_factor) * size_factor for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (
            max(size_factor, math.floor(side / shrink / size_factor) * size_factor) for side in (height, width)
        )
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / size_factor) * size_factor for side in (height, width))
    if not min_pixels <= rows * columns <= max_pixels:
        raise UsageError(
            f"An image of {width:,} x {height:,} pixels cannot be made one of {min_pixels:,} to {max_pixels:,} in "
            f"multiples of {size_factor}; widen these bounds or crop it."
        )
    return rows, columns


def shrink_image(
    image: Image, max_pixels: int = 28 * 28 * 1280, min_pixels: int = 56 * 56, size_factor: int = 28
) -> Image:
    """The image in the size of `fit_size`, by bicubic interpolation."""
    from PIL import Image as pillow

    height, width = fit_size(image.height, image.width, max_pixels, min_pixels, size_factor)
    return image if (width, height) == image.size else image.resize((width, height), pillow.Resampling.BICUBIC)
