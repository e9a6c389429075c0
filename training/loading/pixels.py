"""From the bytes of an image and its mask to what a model sees: decoded, resized, cropped, flipped, jittered.

The mask goes the same way as the image: same size, same filter, same crop, same flip. Which bucket and which size after
resizing is the plan's (`training.buckets`). No torch.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from sharding.images import ImageError, decode_grey, decode_rgb
from training.buckets import Placement
from training.loading.colour import ColourJitter, jittered
from training.randomness import SampleIdentity, uniform

Crop = Literal["centre", "random", "focus"]
Pixels = npt.NDArray[np.uint8]

RESAMPLING = Image.Resampling.HAMMING
"""Filter of all resizing. Of Pillow's, the nearest to an exact area average (OpenCV's INTER_AREA) between 1/1.4 and
1/2.3 of the size, the range left after DCT scaling; Pillow's BOX picks whole pixels there and shifts lines. It does not
ring, so that a mask's edge does not reach beyond itself."""


@dataclass(frozen=True)
class PixelSettings:
    """How pixels get into the bucket. Raises ValueError for numbers out of range."""

    crop: Crop = "centre"
    """Which part of a resized image that is larger than its bucket is used; `focus`: around what its mask shows."""
    flip_fraction: float = 0.0
    """Probability of each showing to be mirrored left to right."""
    colour_jitter: ColourJitter = field(default_factory=ColourJitter)
    with_masks: bool = True
    """Give the masks of samples that have one to the recipe."""

    def __post_init__(self) -> None:
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop: must be centre, random or focus, got {self.crop!r}")
        if not 0 <= self.flip_fraction <= 1:
            raise ValueError(f"flip_fraction: must be between 0 and 1, got {self.flip_fraction}")

    @property
    def needs_masks(self) -> bool:
        return self.with_masks or self.crop == "focus"


@dataclass(frozen=True)
class Shown:
    """What a model sees of one showing."""

    image: Pixels
    """(H, W, 3) of the bucket."""
    mask: Pixels | None
    """(H, W) of the bucket."""
    left: int
    top: int


def show(
    image_bytes: bytes,
    mask_bytes: bytes,
    *,
    size: tuple[int, int],
    placement: Placement,
    settings: PixelSettings,
    identity: SampleIdentity,
) -> Shown:
    """Return the pixels of one showing. size: (width, height) that the index promises; mask_bytes may be empty.

    Raises ImageError: the image cannot be read or has another size, or the mask does (`bad_mask`).
    """
    image: Pixels = np.asarray(resized_image(image_bytes, *size, placement=placement))
    mask = resized_mask(mask_bytes, *size, placement=placement) if mask_bytes else None
    left, top = crop_position(placement, crop=settings.crop, identity=identity, mask=mask)
    window = slice(top, top + placement.bucket.height), slice(left, left + placement.bucket.width)
    image, mask = image[window], mask[window] if mask is not None and settings.with_masks else None
    if is_flipped(settings, identity):
        image, mask = image[:, ::-1], mask[:, ::-1] if mask is not None else None
    if settings.colour_jitter.is_on:
        image = jittered(image, settings.colour_jitter, identity=identity)
    return Shown(image, mask, left, top)


def is_flipped(settings: PixelSettings, identity: SampleIdentity) -> bool:
    """Tell whether a showing is mirrored left to right."""
    return settings.flip_fraction > 0 and uniform(identity, "flip") < settings.flip_fraction


def shown_mask(
    data: bytes, *, size: tuple[int, int], placement: Placement, left: int, top: int, is_mirrored: bool
) -> Pixels:
    """Return the mask of a showing whose picture was cut at (left, top) already. Raises ImageError `bad_mask`."""
    mask = resized_mask(data, *size, placement=placement)
    mask = mask[top : top + placement.bucket.height, left : left + placement.bucket.width]
    return mask[:, ::-1] if is_mirrored else mask


def crop_position(
    placement: Placement, *, crop: Crop, identity: SampleIdentity, mask: Pixels | None = None
) -> tuple[int, int]:
    """Return (left, top) of the bucket in the resized image, in pixels.

    focus: the middle of the bucket is as near as can be to the mask's centre of gravity; without a mask, or with a
    black one, to the image's middle. mask: (resized height, resized width).
    """
    bucket = placement.bucket
    spare_width, spare_height = placement.resized_width - bucket.width, placement.resized_height - bucket.height
    if crop == "random":
        across, down = identity.generator("crop").random(2)
        return int(across * (spare_width + 1)), int(down * (spare_height + 1))
    if crop == "focus" and mask is not None and mask.any():
        weights = mask.astype(np.int64)
        return (
            min(max(_start_around_centre(weights.sum(axis=0), bucket.width), 0), spare_width),
            min(max(_start_around_centre(weights.sum(axis=1), bucket.height), 0), spare_height),
        )
    return spare_width // 2, spare_height // 2


def _start_around_centre(weights: npt.NDArray[np.int64], length: int) -> int:
    """Return the start of `length` pixels around the centre of gravity, in whole numbers: no rounding to differ in."""
    middles_twice = 2 * np.arange(len(weights), dtype=np.int64) + 1
    total = int(weights.sum())
    return (int((weights * middles_twice).sum()) - length * total) // (2 * total)


def resized_image(data: bytes, width: int, height: int, *, placement: Placement) -> Image.Image:
    """Decode and resize to the placement's size, not yet cropped: RGB, upright.

    width, height: pixels that the index promises. A JPEG is decoded at the smallest DCT scale that still covers the
    resized size. Raises ImageError; `size_mismatch` when the image has another size than promised.
    """
    resized = (placement.resized_width, placement.resized_height)
    shorter, longer = min(width, height), max(width, height)
    # The second term: rounding may ask a pixel more of the longer side than the shorter side's scale gives.
    min_side = max(min(resized), math.ceil(max(resized) * shorter / longer))
    image = decode_rgb(data, min_side=min_side)
    scaled_sizes = {(-(-width // scale), -(-height // scale)) for scale in (1, 2, 4, 8)}
    if image.size not in scaled_sizes or (image.size != (width, height) and min(image.size) < min_side):
        raise ImageError("size_mismatch", f"decoded {image.width}x{image.height}, the index says {width}x{height}")
    return image if image.size == resized else image.resize(resized, RESAMPLING)


def resized_mask(data: bytes, width: int, height: int, *, placement: Placement) -> Pixels:
    """Return a mask at the placement's size, not yet cropped: (H, W), white is 255.

    Raises ImageError `bad_mask` when it cannot be read or has another size than its image.
    """
    try:
        mask = decode_grey(data)
    except ImageError as error:
        raise ImageError("bad_mask", f"the mask is {error}") from error
    if mask.size != (width, height):
        raise ImageError("bad_mask", f"the mask has {mask.width}x{mask.height}, the picture {width}x{height}")
    resized = (placement.resized_width, placement.resized_height)
    return np.asarray(mask if mask.size == resized else mask.resize(resized, RESAMPLING))
