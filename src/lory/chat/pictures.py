"""Pictures in a conversation: opened once, kept as the bytes of a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lory.runtime import UsageError

MARK = "<image>"


@dataclass(frozen=True)
class Picture:
    """An image that can be opened."""

    name: str
    """As the person called it."""
    data: bytes = field(repr=False)
    """An image file's content."""

    @property
    def data_url(self) -> str:
        """The picture as a data URL."""
        from PIL import Image

        kind = Image.MIME.get(Image.open(io.BytesIO(self.data)).format or "", "application/octet-stream")
        return f"data:{kind};base64,{base64.b64encode(self.data).decode()}"


def open_picture(source: str | bytes, root: Path | None = None) -> Picture:
    """The picture at a path, a data URL or an address on the web, or in a file's bytes; it is looked at at once.

    Args:
        root: the folder that a path has to lie in; None: any.

    Raises:
        UsageError: it is not there, too large, or no image.
    """
    from lory.data.vision.images import ImageLimits, open_image

    in_text = isinstance(source, str) and source[:5].lower() == "data:"
    on_web = isinstance(source, str) and not in_text and "://" in source
    if isinstance(source, str) and not in_text and not on_web:
        source = str(Path(source).expanduser())
    image = open_image(source, root or Path(Path.cwd().anchor), ImageLimits(allow_urls=True))
    if isinstance(source, bytes):
        return Picture("image", source)
    if in_text:
        return Picture("image", base64.b64decode(source.partition(",")[2]))
    if not on_web:
        return Picture(source, Path(source).read_bytes())
    # what was fetched, as it was seen; the address may hold something else tomorrow
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(source, file.getvalue())


def mark_pictures(text: str, pictures: Sequence[Picture]) -> str:
    """The text with a mark for each picture: its own marks, or new ones at its start.

    Raises:
        UsageError: it has marks, but fewer or more than there are pictures.
    """
    marks = text.count(MARK)
    if not pictures or marks == len(pictures):
        return text
    if marks:
        raise UsageError(f"The text has {marks} {MARK} for {len(pictures)} images; write one for each, or none.")
    return MARK * len(pictures) + text
