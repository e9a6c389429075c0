"""The picture of one showing: pixels decoded from a shard, or a latent that was encoded ahead, and its mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sharding.images import ImageError
from training.buckets import Placement
from training.latents.stored import Place, StoredTensors
from training.latents.wanted import latent_id
from training.loading.chunk_source import SampleBytes
from training.loading.pixels import Pixels, PixelSettings, crop_position, is_flipped, show, shown_mask
from training.randomness import SampleIdentity

MID_GREY = 128


@dataclass(frozen=True)
class Picture:
    """What a model sees of one showing: an image or a latent."""

    image: Pixels | None
    """(H, W, 3) of the bucket."""
    latent: torch.Tensor | None
    """(C, h, w)."""
    mask: Pixels | None
    """(H, W) of the bucket."""
    left: int
    top: int


class Pictures(Protocol):
    """Where pictures come from. row: of the index."""

    def load(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Picture:
        """Return the picture. Raises ImageError when it cannot be used, ChunkError when its file is damaged."""

    def stand_in(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Picture:
        """Return what stands in the slot of a picture that cannot be used."""


class DecodedPictures:
    """Decodes, resizes and crops."""

    def __init__(self, source: SampleBytes, settings: PixelSettings) -> None:
        self._bytes, self._settings = source, settings

    def load(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Picture:
        image = self._bytes.image(row)
        mask = self._bytes.mask(row) if self._settings.needs_masks else b""
        size = (row["width"], row["height"])
        shown = show(image, mask, size=size, placement=placed, settings=self._settings, identity=identity)
        return Picture(shown.image, None, shown.mask, shown.left, shown.top)

    def stand_in(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Picture:
        pixels = np.full((placed.bucket.height, placed.bucket.width, 3), MID_GREY, np.uint8)
        return Picture(pixels, None, None, *crop_position(placed, crop=self._settings.crop, identity=identity))


class StoredPictures:
    """Reads latents; of the shards only masks are read."""

    def __init__(self, source: SampleBytes, settings: PixelSettings, stored: StoredTensors) -> None:
        self._bytes, self._settings, self._stored = source, settings, stored

    def load(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Picture:
        place = self._place(row, placed, identity)
        if place.reason:
            reason, _, detail = place.reason.partition(": ")
            raise ImageError(reason, detail)
        mask = None
        if self._settings.with_masks and (data := self._bytes.mask(row)):
            size, is_mirrored = (row["width"], row["height"]), is_flipped(self._settings, identity)
            mask = shown_mask(
                data, size=size, placement=placed, left=place.left, top=place.top, is_mirrored=is_mirrored
            )
        return Picture(None, self._stored.tensors(place)[0], mask, place.left, place.top)

    def stand_in(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Picture:
        place = self._place(row, placed, identity)
        zeros = torch.zeros_like(self._stored.tensors(place)[0])
        return Picture(None, zeros, None, place.left, place.top)

    def _place(self, row: Mapping[str, Any], placed: Placement, identity: SampleIdentity) -> Place:
        is_mirrored = is_flipped(self._settings, identity)
        return self._stored.place(latent_id(row["key"], placed, is_flipped=is_mirrored))


def stacked_images(pictures: Sequence[Picture]) -> torch.Tensor | None:
    """Return (B, 3, H, W) uint8; None for latents."""
    images = [one.image for one in pictures if one.image is not None]
    if not images:
        return None
    height, width, _ = images[0].shape
    stacked = np.empty((len(images), 3, height, width), np.uint8)
    for slot, image in enumerate(images):
        # In one go: a copy of flipped pixels, three bytes at a time, takes a fifth of what decoding takes.
        stacked[slot] = image.transpose(2, 0, 1)
    return torch.from_numpy(stacked)


def stacked_latents(pictures: Sequence[Picture]) -> torch.Tensor | None:
    """Return (B, C, h, w) in the stored format; None for images."""
    latents = [one.latent for one in pictures if one.latent is not None]
    return torch.stack(latents) if latents else None


def stacked_masks(pictures: Sequence[Picture], *, height: int, width: int) -> torch.Tensor | None:
    """Return (B, 1, H, W) uint8, white for samples without a mask; None when none has one."""
    if all(one.mask is None for one in pictures):
        return None
    masks = np.full((len(pictures), 1, height, width), 255, np.uint8)
    for slot, one in enumerate(pictures):
        if one.mask is not None:
            masks[slot, 0] = one.mask
    return torch.from_numpy(masks)
