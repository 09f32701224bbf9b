"""What a frozen tower gave for each image, kept on disk: an image is encoded once, not once an epoch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from lory.models.vision_body import Features, tower_parameters
from lory.runtime import cache_folder, log
from lory.types import SampleImage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def key_of(image: SampleImage) -> str:
    """What two images share whose features are the same: pixels and the size that they are shrunk to."""
    size = "" if image.size is None else f"-{image.size[0]}x{image.size[1]}"
    return image.digest.hex() + size


def hash_tower(model: PreTrainedModel, settings: str) -> str:
    """A name for what decides about features: the tower's weights and precision, and how images are prepared."""
    digest = hashlib.sha256(f"{settings} {model.config.to_json_string()} {model.device.type} {model.dtype}".encode())
    for name, parameter in tower_parameters(model).items():
        digest.update(name.encode())
        digest.update(_to_bytes(parameter.detach().cpu().contiguous()))
    return digest.hexdigest()[:32]


class FeatureCache:
    """Features by image, in files of one tower; this process adds to a file of its own.

    Attributes:
        hits, misses: how often features were found, and how often not.
    """

    def __init__(self, name: str, most_bytes: int) -> None:
        """`most_bytes`: how much is kept on disk; what is beyond is encoded anew each time."""
        self.folder = cache_folder() / "features" / name
        self.most_bytes, self.hits, self.misses = most_bytes, 0, 0
        self._places: dict[str, tuple[int, dict[str, Any]]] = {}
        self._files: list[BinaryIO] = []
        self._size, self._full = 0, False
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        _make_room(self.folder, most_bytes)
        for path in sorted(self.folder.glob("*.index")):
            self._read(path)
        own = self.folder / uuid.uuid4().hex
        self._out = own.with_suffix(".bin").open("wb")
        self._index = own.with_suffix(".index").open("w", encoding="utf-8")
        self._files.append(own.with_suffix(".bin").open("rb"))
        self._own = len(self._files) - 1

    def _read(self, path: Path) -> None:
        data = path.with_suffix(".bin")
        # another process may be writing it, or have been killed while it did
        with contextlib.suppress(OSError, ValueError):
            size = data.stat().st_size
            self._files.append(data.open("rb"))
            self._size += size
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry["end"] <= size:
                    self._places[entry["key"]] = len(self._files) - 1, entry

    def __contains__(self, image: SampleImage) -> bool:
        return key_of(image) in self._places

    def get(self, image: SampleImage) -> Features:
        """The features of an image that is in the cache."""
        number, entry = self._places[key_of(image)]
        self.hits += 1
        found: Features = {}
        file = self._files[number]
        file.seek(entry["start"])
        for name, (kind, shape) in entry["tensors"].items():
            dtype: torch.dtype = getattr(torch, kind)
            count = math.prod(shape) * dtype.itemsize
            found[name] = torch.frombuffer(bytearray(file.read(count)), dtype=dtype).view(*shape)
        return found

    def add(self, image: SampleImage, features: Features) -> None:
        """Keep an image's features, while there is room."""
        self.misses += 1
        if self._full or key_of(image) in self._places:
            return
        ready = {name: value.detach().cpu().contiguous() for name, value in features.items()}
        start, size = self._out.tell(), sum(value.nbytes for value in ready.values())
        if self._size + size > self.most_bytes:
            self._full = True
            log.warning(
                "The encoded images take %.1f GB, which is the limit; the others are encoded in every epoch. Raise "
                "data.image_cache_gb to keep more.",
                self._size / 1e9,
            )
            return
        try:
            for value in ready.values():
                self._out.write(_to_bytes(value))
            self._out.flush()
        except OSError as error:
            self._full = True
            log.warning("The encoded images cannot be kept, so each is encoded in every epoch: %s.", error.strerror)
            return
        self._size += size
        tensors = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in ready.items()}
        entry = {"key": key_of(image), "start": start, "end": start + size, "tensors": tensors}
        self._index.write(json.dumps(entry) + "\n")
        self._index.flush()
        self._places[entry["key"]] = self._own, entry

    def close(self) -> None:
        """Give the files back; of a run that had nothing to add, none stays, or there would be ever more to open."""
        names = (self._out.name, self._index.name) if not self._out.closed and self._out.tell() == 0 else ()
        self._out.close()
        self._index.close()
        for file in self._files:
            file.close()
        self._files = []
        for name in names:
            Path(name).unlink(missing_ok=True)


def _to_bytes(value: Tensor) -> bytes:
    content: bytes = value.flatten().view(torch.uint8).numpy().tobytes()
    return content


def _make_room(newest: Path, most_bytes: int) -> None:
    """Delete the features of other towers, those that were not used for the longest time first."""
    sizes: dict[Path, int] = {}
    used: dict[Path, float] = {}
    for folder in newest.parent.iterdir():
        with contextlib.suppress(OSError):  # another run may delete it meanwhile
            sizes[folder] = sum(file.stat().st_size for file in folder.iterdir())
            used[folder] = folder.stat().st_mtime
    for folder in sorted(sizes, key=lambda folder: used.get(folder, 0.0)):
        if sum(sizes.values()) <= most_bytes or folder == newest:
            return
        shutil.rmtree(folder, ignore_errors=True)
        log.info("Deleted %s, encoded images of another tower, to stay below the limit.", folder)
        del sizes[folder]
