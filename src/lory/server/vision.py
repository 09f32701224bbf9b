"""The images of requests, opened and prepared within limits, beside the thread that writes the prompts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lory.data.vision.images import ImageLimits, open_image
from lory.data.vision.reader import ImageReader, Seen
from lory.runtime import UsageError
from lory.server.errors import ApiError
from lory.server.limits import Limits

# As many requests have their images open at a time
_WORKERS = 4


class ImageDesk:
    """Opens and prepares the images of requests, of a few at a time; the others wait in a queue."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pool = ThreadPoolExecutor(_WORKERS, "lory-images")
        self._pending = 0
        # a processor is not for several threads
        self._seeing = threading.Lock()

    async def see(self, sources: Sequence[str], reader: ImageReader) -> Seen:
        """What the model's processor makes of the images at these data URLs or links.

        Raises:
            ApiError: there are too many of them, one of them cannot be opened, or the queue is full.
        """
        limits = self._limits
        if len(sources) > limits.images:
            message = f"The request has {len(sources)} images; at most {limits.images} are taken."
            raise ApiError(400, message, "messages", "too_many_images")
        if self._pending >= limits.max_batch + limits.queue:
            raise ApiError(429, "Too many requests with images are waiting; try again later.")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._see, sources, reader)
        except UsageError as error:
            raise ApiError(400, str(error), "messages", "invalid_image") from error
        finally:
            self._pending -= 1

    def _see(self, sources: Sequence[str], reader: ImageReader) -> Seen:
        limits = self._limits
        deadline = time.monotonic() + limits.image_seconds
        images = []
        for source in sources:
            left = max(deadline - time.monotonic(), 0.01)
            own = ImageLimits(limits.image_pixels, limits.image_bytes, limits.image_links, timeout_seconds=left)
            # no paths: a client must not read this machine's files
            images.append(open_image(source, None, own))
        with self._seeing:
            return reader.see(images)
