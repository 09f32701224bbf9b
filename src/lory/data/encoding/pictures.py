"""The images of a conversation while it is encoded: opened, counted in tokens, and shrunk where it is too long."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lory.data.vision.images import ImageLimits, fit_size, open_image
from lory.data.vision.reader import ImageReader, check_marks, list_media
from lory.runtime import LoryError, UsageError
from lory.types import Media, Message, SampleImage

if TYPE_CHECKING:
    from PIL.Image import Image

_NAME = re.compile(r"^The image ('.*?'|of [\d,]+ (bytes|x [\d,]+ pixels)) ")
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class ImageRules:
    """Which images of records are opened, and what happens to a broken one."""

    roots: tuple[Path, ...] = ()
    """Folders of which a path has to lie in one."""
    on_bad: Literal["error", "drop"] = "error"
    limits: ImageLimits = field(default_factory=ImageLimits)

    def find_root(self, source: str | bytes) -> Path | None:
        """The folder that a path is in as it is spelled; open_image follows its links. None: no path at all."""
        if isinstance(source, bytes) or not self.roots:
            return None
        path = os.path.abspath(source)
        inside = (root for root in self.roots if path.startswith(os.path.join(os.path.abspath(root), "")))
        return next(inside, self.roots[0])


class BadImage(UsageError):
    """An image that cannot be used, or a text that does not say where its images are."""

    def __init__(self, problem: str, source: str | bytes = b"") -> None:
        super().__init__(problem)
        self.source = source

    @property
    def path(self) -> str:
        """Where its file is; empty if it is no file's."""
        if isinstance(self.source, bytes) or "://" in self.source or self.source[:5].lower() == "data:":
            return ""
        return os.path.abspath(self.source)

    @property
    def reason(self) -> str:
        """The problem without names and numbers, so that like ones can be counted."""
        problem = _NUMBER.sub("#", _NAME.sub("an image that ", str(self)))
        return re.split(r"[;]|\.$", problem)[0][:160]


def find_images(messages: Sequence[Message]) -> list[Media]:
    """The images of messages, in their order.

    Raises:
        BadImage: there are other media, or more marks in a text than images, or fewer.
    """
    try:
        media = list_media(messages)
        check_marks(messages)
    except UsageError as error:
        raise BadImage(str(error)) from error
    return media


class Pictures:
    """The images of one conversation, in their order."""

    def __init__(self, reader: ImageReader, media: Sequence[Media], rules: ImageRules) -> None:
        """Open all of them.

        Raises:
            BadImage: one is missing, broken, not allowed, or refused by the processor.
        """
        self.reader = reader
        self.images: list[Image] = []
        self.references: list[SampleImage] = []
        self._marks: dict[int, list[str]] = {}
        for item in media:
            try:
                image = open_image(item.source, rules.find_root(item.source), rules.limits)
                alone = reader.see([image]).marks
            except UsageError as error:
                raise BadImage(str(error), item.source) from error
            self.images.append(image)
            self.references.append(SampleImage(_keep_source(item.source, image), digest_pixels(image)))
            self._marks = {1: alone} if len(media) == 1 else {}
        self._sized = list(self.images)

    def marks(self, count: int) -> list[str]:
        """What stands in the text for each of the first `count` images."""
        if count not in self._marks:
            self._marks[count] = self.reader.see(self._sized[:count]).marks
        return self._marks[count]

    def shrink(self, share: float) -> bool:
        """Make every image smaller, to about `share` of the pixels it has now; whether any could be."""
        if not self.reader.bounds:
            return False
        changed = False
        least = self.reader.bounds[0]
        for number, (image, sized) in enumerate(zip(self.images, self._sized, strict=True)):
            now = self.reader.fit(sized.height, sized.width)
            most = max(int(now[0] * now[1] * share), least, self.reader.factor**2)
            try:
                height, width = fit_size(image.height, image.width, most, min(least, most), self.reader.factor)
            except UsageError:
                continue  # too long and thin to be any smaller
            if height * width < now[0] * now[1]:
                changed = True
                self._sized[number] = resize(image, (height, width))
                old = self.references[number]
                self.references[number] = SampleImage(old.source, old.digest, (height, width))
        self._marks = {}
        return changed


def resize(image: Image, size: tuple[int, int]) -> Image:
    """The image in a size of (height, width), by bicubic interpolation."""
    from PIL import Image as pillow

    return image.resize((size[1], size[0]), pillow.Resampling.BICUBIC)


def digest_pixels(image: Image) -> bytes:
    """16 bytes that images share if they have the same size and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


def _keep_source(source: str | bytes, image: Image) -> str | bytes:
    """What the image can be opened from again, wherever the process works; of one from the web, a copy."""
    if isinstance(source, bytes) or source[:5].lower() == "data:":
        return source
    if not source[:8].lower().startswith(("http://", "https://")):
        return os.path.abspath(source)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def reopen(reference: SampleImage) -> Image:
    """The pixels of a sample's image.

    Raises:
        LoryError: it is not what it was when the data were encoded.
    """
    # where its path leads was checked then; the copy of one from the web may be larger than what was fetched
    limits = ImageLimits()
    if isinstance(reference.source, bytes):
        limits = replace(limits, max_bytes=max(limits.max_bytes, len(reference.source)))
    image = open_image(reference.source, Path(Path.cwd().anchor), limits)
    if digest_pixels(image) != reference.digest:
        name = reference.source if isinstance(reference.source, str) else "of a data file"
        raise LoryError(f"The image {name[:200]} has changed since the data were encoded; start the run again.")
    return image if reference.size is None else resize(image, reference.size)
