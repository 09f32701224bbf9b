"""Images in training: decoded ahead of their step in other threads, encoded once where the tower is frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lory.data.encoding.pictures import reopen
from lory.data.mixture.collate import Batch
from lory.data.vision.reader import ImageReader
from lory.models.attention import document_arguments
from lory.models.vision_body import (
    GRID,
    Features,
    VisionBody,
    explain_apart,
    speed_up_tower,
    tower_parameters,
)
from lory.runtime import LoryError, UsageError, log
from lory.training.features import FeatureCache, hash_tower
from lory.training.step import attention_for
from lory.types import SampleImage

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

_NO_IMAGES = torch.zeros(0, 3, dtype=torch.long)


class Sight:
    """What stands between a batch's images and the language model's states.

    Attributes:
        cache: the features of images that a frozen tower has seen; None: it is trained, or no cache is wanted.
    """

    def __init__(self, model: PreTrainedModel, reader: ImageReader, cache: FeatureCache | None) -> None:
        """Raises `UsageError` if this model's tower cannot be run apart from its language model."""
        if reason := explain_apart(model):
            raise UsageError(f"{reason}, so lory cannot train it on images yet.")
        if "token_type_ids" in reader.kinds([0]):
            raise UsageError(
                f"{type(model).__name__} lets the tokens of an image see each other, which lory cannot train yet."
            )
        self.vision, self.reader, self.cache = VisionBody(model), reader, cache
        self._tower: list[nn.Parameter] = list(tower_parameters(model).values())
        language = model.get_decoder()
        self._tower_modules = [child for child in model.base_model.children() if child is not language]
        self._splits = True  # whether the tower's output tells images apart
        self._pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) - 1)), thread_name_prefix="lory-images")

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of tower and projector is trained."""
        return not any(parameter.requires_grad for parameter in self._tower)

    def load(self, batch: Batch) -> Batch:
        """The batch with the pixels of the images that the tower has to see; called ahead, in another thread."""
        wanted = self._list_unseen(batch)
        if not wanted or batch.pixels is not None:
            return batch
        pictures = list(self._pool.map(reopen, wanted))
        return replace(batch, pixels=self._see(pictures), pixel_images=tuple(wanted))

    def _see(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        return self.reader.see(pictures).inputs

    def _list_unseen(self, batch: Batch) -> list[SampleImage]:
        images = [image for document in batch.images for image in document]
        if self.cache is None:
            return images
        return list({image: None for image in images if image not in self.cache})

    def run_body(self, batch: Batch) -> Tensor:
        """(B, T, H) last hidden states of a batch, with its images in their places."""
        device = batch.input_ids.device
        output, grids = self._encode(batch)
        lengths = batch.seq_lens.tolist()
        rows = batch.input_ids.cpu()
        if batch.attention_mask is None:
            documents = list(rows[0].split(lengths))
            arguments: dict[str, Any] = document_arguments(batch.seq_lens, device)
        else:
            documents = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            arguments = {"attention_mask": batch.attention_mask}
        images = batch.images or ((),) * len(documents)
        per_document = _deal(grids, [len(document) for document in images])
        if (positions := self.vision.positions(documents, per_document)) is not None:
            arguments["position_ids"] = _lay_out(positions, rows.shape, batch.attention_mask is None).to(device)
        return self.vision(output, input_ids=batch.input_ids, **arguments)

    def _encode(self, batch: Batch) -> tuple[Any, Tensor]:
        """The tower's output for all images of a batch, and their (images, 3) grids."""
        images = [image for document in batch.images for image in document]
        if not images:
            return None, _NO_IMAGES
        batch = self.load(batch)
        if self.cache is None:
            assert batch.pixels is not None
            return self._run_tower(batch.pixels), batch.pixels.get(GRID, _NO_IMAGES)
        features = self._recall(batch, images)
        grids = [feature[GRID] for feature in features if GRID in feature]
        return self.vision.join(features), torch.stack(grids) if grids else _NO_IMAGES

    def _run_tower(self, pixels: Mapping[str, Tensor]) -> Any:
        """What the tower gives for images: with gradient where it is trained, else as when the model is served."""
        if not self.is_frozen:
            return self.vision.encode(pixels)
        modes = [(module, module.training) for module in self._tower_modules]
        try:
            for module in self._tower_modules:
                module.eval()
            with torch.no_grad():
                return self.vision.encode(pixels)
        finally:
            for module, mode in modes:
                module.train(mode)

    def _recall(self, batch: Batch, images: Sequence[SampleImage]) -> list[Features]:
        """Each image's features, from the cache or from the tower, which then are kept."""
        assert self.cache is not None
        fresh: dict[SampleImage, Features] = {}
        # what was unseen when the pixels were made may have been seen since, in the step before
        if batch.pixels is not None and any(image not in self.cache for image in batch.pixel_images):
            fresh = self._encode_fresh(batch.pixels, batch.pixel_images)
        return [fresh[image] if image in fresh else self.cache.get(image) for image in images]

    def _encode_fresh(self, pixels: Mapping[str, Tensor], images: Sequence[SampleImage]) -> dict[SampleImage, Features]:
        assert self.cache is not None
        found = self.vision.split(self._run_tower(pixels), pixels, len(images)) if self._splits else None
        if found is None:
            self._splits = False
            found = [self._encode_one(image) for image in images]
        for image, features in zip(images, found, strict=True):
            self.cache.add(image, features)
        return dict(zip(images, found, strict=True))

    def _encode_one(self, image: SampleImage) -> Features:
        pixels = self._see([reopen(image)])
        features = self.vision.split(self._run_tower(pixels), pixels, 1)
        if features is None:
            raise LoryError("The model's tower gives several outputs for one image; set data.image_cache_gb to 0.")
        return features[0]

    @torch.no_grad()
    def speed_up(self, batch: Batch) -> bool:
        """Let the tower run faster; whether one document with images has the states that the model's own forward gave
        it before that."""
        model = self.vision.model
        training = model.training
        model.eval()
        try:
            pixels = self._see([reopen(image) for image in batch.images[0]])
            placed = {name: self.vision.place(value) for name, value in pixels.items()}
            kinds = self.reader.kinds(batch.input_ids[0].tolist())
            placed |= {name: value.to(model.device) for name, value in kinds.items()}
            ids = batch.input_ids.to(model.device)
            own = model.base_model(input_ids=ids, **placed, use_cache=False).last_hidden_state
            if speed_up_tower(model):
                log.debug("The tower's attention or products are others from here on.")
            with attention_for(model, batch):
                ours = self.run_body(batch.to(model.device))
        finally:
            model.train(training)
        limit = 1e-3 if own.dtype == torch.float32 else 5e-2
        return bool((own - ours).abs().max() <= limit * own.abs().max().clamp(min=1e-6))

    def close(self) -> None:
        """End the threads and give the cache's files back."""
        self._pool.shutdown(cancel_futures=True)
        if self.cache is not None:
            self.cache.close()


def _deal(grids: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Each document's share of the images' grids."""
    return list(grids.split(list(counts))) if len(grids) else [_NO_IMAGES for _ in counts]


def _lay_out(positions: Sequence[Tensor], shape: torch.Size, packed: bool) -> Tensor:
    """(3, B, T) positions of a batch: one after the other in its row, or padded with zeros."""
    if packed:
        return torch.cat(list(positions), dim=1)[:, None]
    laid = torch.zeros(3, *shape, dtype=torch.long)
    for row, own in enumerate(positions):
        laid[:, row, : own.shape[1]] = own
    return laid


def open_sight(model: PreTrainedModel, reader: ImageReader, cache_gb: float) -> Sight:
    """What a run needs for its images; the cache is open where the tower is frozen and there is room for it."""
    sight = Sight(model, reader, None)
    if not sight.is_frozen:
        log.info("Images are encoded in every step, since the model's tower or projector is trained.")
    elif cache_gb > 0:
        sight.cache = FeatureCache(hash_tower(model, reader.describe()), int(cache_gb * 1e9))
        log.info("Each image is encoded once, since tower and projector are frozen; kept in %s.", sight.cache.folder)
    return sight
