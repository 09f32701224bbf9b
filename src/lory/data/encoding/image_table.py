"""The images of a store: where each is, and what it was when the samples were encoded; no pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lory.data.encoding.arrow_table import Table, read_table
from lory.types import SampleImage

IMAGES = "images.arrow"
_ROWS = 32
"""In a batch: some hold whole files."""
_BROKEN = b"\0" * 16
"""The digest of an image that could not be used."""


class ImageWriter:
    """Fills the table; the same image is kept once."""

    def __init__(self, folder: Path) -> None:
        import pyarrow

        fields = [
            ("digest", pyarrow.binary(16)),
            # a path or data URL; else the file's content
            ("source", pyarrow.string()),
            ("content", pyarrow.binary()),
            # (height, width) that it was shrunk to; 0 if it was not
            ("height", pyarrow.int32()),
            ("width", pyarrow.int32()),
            # of a file, to notice when it changes
            ("bytes", pyarrow.int64()),
            ("changed_ns", pyarrow.int64()),
        ]
        self._table = Table(folder / IMAGES, pyarrow.schema(fields), _ROWS)
        self._numbers: dict[tuple[bytes, tuple[int, int] | None], int] = {}
        self._broken: set[str] = set()
        self._count = 0

    def add(self, images: Iterable[SampleImage]) -> list[int]:
        """The numbers of a sample's images in the table."""
        return [self._add_one(image) for image in images]

    def add_broken(self, path: str) -> None:
        """Remember a file that could not be used, to look at it again once it has changed."""
        if path not in self._broken:
            self._broken.add(path)
            self._append(SampleImage(path, _BROKEN))

    def _add_one(self, image: SampleImage) -> int:
        key = image.digest, image.size
        if key not in self._numbers:
            self._numbers[key] = self._append(image)
        return self._numbers[key]

    def _append(self, image: SampleImage) -> int:
        source = image.source if isinstance(image.source, str) else None
        content = None if isinstance(image.source, str) else image.source
        self._table.append((image.digest, source, content, *(image.size or (0, 0)), *_look_at(image.source)))
        self._count += 1
        return self._count - 1

    def close(self) -> None:
        """Write what is left."""
        self._table.close()


def _look_at(source: str | bytes) -> tuple[int, int]:
    """Size and time of change of the file at a path; -1 where there is none."""
    if isinstance(source, bytes) or source[:5].lower() == "data:":
        return -1, -1
    try:
        status = os.stat(source)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


class ImageTable:
    """A finished table, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._file = read_table(folder / IMAGES)

    def __getitem__(self, number: int) -> SampleImage:
        batch, row = divmod(number, _ROWS)
        columns = self._file.get_batch(batch)
        values: dict[str, Any] = {
            name: columns.column(name)[row].as_py() for name in ("digest", "source", "content", "height", "width")
        }
        size = (values["height"], values["width"]) if values["height"] else None
        return SampleImage(
            values["source"] if values["source"] is not None else values["content"], values["digest"], size
        )

    def is_current(self) -> bool:
        """Whether every file is what it was when the samples were encoded, those that were missing included."""
        for number in range(self._file.num_record_batches):
            columns = self._file.get_batch(number)
            values = (columns.column(name).to_pylist() for name in ("source", "bytes", "changed_ns"))
            for source, size, changed in zip(*values, strict=True):
                if source is not None and _look_at(source) != (size, changed):
                    return False
        return True
