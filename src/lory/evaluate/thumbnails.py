"""Images small enough for a page that holds all of them, as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from lory.data.vision.images import ImageLimits, open_image
from lory.runtime import UsageError
from lory.types import Media

MOST_BYTES = 16_000_000
"""Of all images of a page."""
_WIDEST, _HIGHEST = 640, 320
"""Pixels of an image on the page; a smaller one keeps its size."""


class Thumbnails:
    """Makes the images of a page, as many as fit into it."""

    def __init__(self, most_bytes: int = MOST_BYTES, limits: ImageLimits | None = None) -> None:
        self.left, self.limits = most_bytes, limits or ImageLimits()

    def make(self, media: Media) -> tuple[str, str]:
        """The image as a data URL, and what is to be said of it; one of the two is empty."""
        if self.left <= 0:
            return "", "left out, since the page is full"
        try:
            # what may be opened was decided when the records were read
            url = _shrink(media, self.limits)
        except UsageError as error:
            return "", str(error)
        self.left -= len(url)
        return url, ""


def _shrink(media: Media, limits: ImageLimits) -> str:
    image = open_image(media.source, Path(Path.cwd().anchor), limits)
    image.thumbnail((_WIDEST, _HIGHEST))
    files = {kind: io.BytesIO() for kind in ("png", "jpeg")}
    # drawings are smaller as PNG and keep their edges; photos are smaller as JPEG
    image.save(files["png"], "PNG", optimize=True)
    image.save(files["jpeg"], "JPEG", quality=85)
    sizes = {kind: len(file.getvalue()) for kind, file in files.items()}
    kind = "jpeg" if sizes["jpeg"] * 2 < sizes["png"] else "png"
    return f"data:image/{kind};base64,{base64.b64encode(files[kind].getvalue()).decode()}"
