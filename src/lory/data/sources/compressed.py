"""Data files as bytes and as text, plain or compressed, with a guard against files that unpack to far too much."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from lory.runtime import UsageError

MAX_BYTES = 100 * 2**30
"""The default of how many bytes one file may unpack to, or be downloaded with."""

MAX_RATIO = 300
"""How many bytes each compressed byte may unpack to: text compresses to a tenth, a bomb to a thousandth."""

FREE_BYTES = 64 * 2**20
"""What may be unpacked before the ratio counts, so that a small file of equal records is no bomb."""

_BUFFER = 1 << 20


def _open_gz(raw: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=raw, mode="rb")


def _open_zst(raw: BinaryIO) -> Any:
    import pyarrow  # knows zstd already, notices a truncated file, and reads several frames as one

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": _open_gz,
    ".zst": _open_zst,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
"""What undoes each compression; a reader has `read(count)`."""

# each with the name that its file should have had
_MARKS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of records: its path, the ending that tells its kind, and the ending of its compression, if any."""

    path: Path
    ending: str
    compression: str = ""
    max_bytes: int = MAX_BYTES
    shown: str = ""
    """What errors call it instead of its path."""

    def __str__(self) -> str:
        return self.shown or str(self.path)

    @contextlib.contextmanager
    def open_bytes(self) -> Iterator[BinaryIO]:
        """The unpacked bytes.

        Raises:
            UsageError: while reading, when the compressed data are broken or unpack to too much.
        """
        # opening a pipe may block for ever, and a device never ends
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise UsageError(f"{self} is no regular file, but a pipe or a device; a data file is expected.")
        with self.path.open("rb") as raw:
            if not self.compression:
                yield raw
                return
            with contextlib.closing(OPENERS[self.compression](raw)) as inner:
                yield io.BufferedReader(_Unpacked(inner, raw, self), _BUFFER)

    @contextlib.contextmanager
    def open_text(self, newline: str) -> Iterator[TextIO]:
        """The text: UTF-8, or what a byte order mark says."""
        with self.open_bytes() as file:
            buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, file))
            head = buffered.peek(4)[:4]
            self._refuse_binary(head)
            encoding = next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8")
            with io.TextIOWrapper(buffered, encoding=encoding, newline=newline) as text:
                yield text

    @contextlib.contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """The bytes in a file that can be read from any place; a compressed one is unpacked to the disk for it."""
        with self.open_bytes() as file:
            if not self.compression:
                yield file
                return
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy, _BUFFER)
                copy.seek(0)
                yield copy

    def _refuse_binary(self, head: bytes) -> None:
        for mark, ending in _MARKS.items():
            if head.startswith(mark[:4]):
                raise UsageError(f"{self} is compressed, though its name does not say so; rename it to {self}{ending}.")
        if b"\x00" in head[:2] and not head.startswith(codecs.BOM_UTF32_BE):
            raise UsageError(f"{self} is no UTF-8 text (it may be UTF-16 without a mark); save it as UTF-8.")


class _Unpacked(io.RawIOBase):
    """The bytes that come out of a decompressor, counted."""

    def __init__(self, inner: Any, raw: BinaryIO, file: DataFile) -> None:
        self._inner, self._raw, self._file = inner, raw, file
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UsageError(
                f"{self._file} is broken or cut off after {self._count:,} unpacked bytes "
                f"({str(error).rstrip('.')}); copy or download it again."
            ) from error
        self._count += len(data)
        self._check()
        buffer[: len(data)] = data
        return len(data)

    def _check(self) -> None:
        if self._count > self._file.max_bytes:
            raise UsageError(
                f"{self._file} unpacks to more than {self._file.max_bytes:,} bytes; raise the source's 'max_bytes' "
                "if you trust it."
            )
        packed = self._raw.tell()
        if self._count > FREE_BYTES and self._count > MAX_RATIO * packed:
            raise UsageError(
                f"{self._file} unpacks to more than {MAX_RATIO} times its size ({self._count:,} bytes out of "
                f"{packed:,}), as a decompression bomb does; unpack it yourself if you trust it."
            )
