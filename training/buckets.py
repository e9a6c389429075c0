"""Assign images to resolution buckets: which size a picture is resized to, and what is cropped off.

Pure functions, no torch. Buckets depend on a run's resolution, so they are computed at training time and never
stored. Which pixels are cut (centre or random) is decided in `chunk_data`.

Three families:
    no_upscale  the bucket follows the image: never enlarged, fitted into an area, each side floored to the step
    area        a fixed list of about equal area; the nearest ratio is taken, small images are enlarged
    ratios      a fixed list of aspect ratios at one area; ratios = (1.0,) is the plain square
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

STABLE_CASCADE_RATIOS = (1 / 1, 1 / 2, 1 / 3, 2 / 3, 3 / 4, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1 / 6, 5 / 6, 9 / 16)
"""Aspect ratios of the official Stable Cascade training configs; each stands for its inverse, too."""


class BucketError(ValueError):
    """An image has no bucket. `reason` is a snake_case drop reason, `detail` the evidence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size shared by all images of a micro-batch, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image gets into its bucket: resized to (resized_width, resized_height), then cropped to the bucket."""

    bucket: Bucket
    resized_width: int
    resized_height: int
    crop_loss_fraction: float
    """Share of the resized image's pixels that the crop cuts off."""


@dataclass(frozen=True)
class BucketSettings:
    """Which buckets there are. Raises ValueError when the numbers cannot go together."""

    family: Literal["no_upscale", "area", "ratios"] = "no_upscale"
    resolution_area: int = 1024 * 1024
    """Largest width × height of a bucket, in pixels as the encoder sees them."""
    step: int = 64
    """Sides are multiples of this. The official Stable Cascade buckets have 32."""
    min_side: int = 256
    """Shortest side of a bucket; family `area` only."""
    max_side: int = 4096
    """Longest side of a bucket; family `area` only."""
    ratios: tuple[float, ...] = STABLE_CASCADE_RATIOS
    """Aspect ratios, inverses implied; family `ratios` only."""
    source_scale: float = 1.0
    """Pictures are taken as this much smaller before a bucket is chosen: Stable Cascade's encoder sees 3/4 of a
    picture's sides. Above 1 is refused: it would invent pixels."""

    def __post_init__(self) -> None:
        if self.family not in ("no_upscale", "area", "ratios"):
            raise ValueError(f"buckets.family: must be no_upscale, area or ratios, got {self.family!r}")
        if not 0 < self.source_scale <= 1:
            raise ValueError(f"buckets.source_scale: must be above 0 and at most 1, got {self.source_scale}")
        if self.step < 1 or self.resolution_area < self.step**2:
            raise ValueError(
                f"buckets.resolution_area ({self.resolution_area:,}) must hold at least one step × step"
                f" (buckets.step = {self.step})"
            )
        if self.family == "area" and not self.step <= self.min_side <= math.isqrt(self.resolution_area):
            raise ValueError(
                f"buckets.min_side ({self.min_side}) must lie between buckets.step ({self.step}) and the side of a"
                f" square of buckets.resolution_area ({math.isqrt(self.resolution_area)})"
            )
        if self.family == "area" and self.max_side < math.isqrt(self.resolution_area):
            raise ValueError(
                f"buckets.max_side ({self.max_side}) must be at least the side of a square of"
                f" buckets.resolution_area ({math.isqrt(self.resolution_area)})"
            )
        if self.family == "ratios" and (not self.ratios or min(self.ratios) <= 0):
            raise ValueError(f"buckets.ratios: must be positive numbers, got {self.ratios}")


@lru_cache(maxsize=16)
def listed_buckets(settings: BucketSettings) -> tuple[Bucket, ...]:
    """Return the fixed buckets of families `area` and `ratios`, sorted; () for `no_upscale`, which has no list.

    `area`: for every width from min_side to max_side in steps the largest height that fits the area, both ways
    round, and the square (the rule of kohya-ss sd-scripts). `ratios`: sides sqrt(area · ratio) and
    sqrt(area / ratio), floored to the step (the rule of Stability's Bucketeer, whose factor is 32).
    """
    step, area = settings.step, settings.resolution_area
    buckets = set()
    if settings.family == "area":
        square = math.isqrt(area) // step * step
        buckets.add(Bucket(square, square))
        for width in range(settings.min_side, settings.max_side + 1, step):
            height = min(settings.max_side, area // width // step * step)
            if height >= settings.min_side:
                buckets |= {Bucket(width, height), Bucket(height, width)}
    elif settings.family == "ratios":
        for ratio in settings.ratios:
            # 1e-9: the square of an exact side must not be floored a step down by rounding.
            long, short = (
                int(math.sqrt(area * r) / step + 1e-9) * step for r in (max(ratio, 1 / ratio), min(ratio, 1 / ratio))
            )
            if short > 0:
                buckets |= {Bucket(long, short), Bucket(short, long)}
    return tuple(sorted(buckets))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to width / height.

    Distance is |log ratio|, so 2:1 and 1:2 are equally far from 1:1 (the references subtract ratios, which favours
    portrait buckets). Ties go to the bucket with more pixels. Raises ValueError if buckets is empty.
    """
    if not buckets:
        raise ValueError("no buckets to choose from; check buckets.ratios and buckets.step")
    return min(buckets, key=lambda b: (ratio_distance(width, height, b), -b.width * b.height, b))


def ratio_distance(width: int, height: int, bucket: Bucket) -> float:
    """Return |log((width / height) / (bucket.width / bucket.height))|, rounded so that equal ratios compare equal."""
    return round(abs(math.log(width * bucket.height / (height * bucket.width))), 12)


def placement(width: int, height: int, *, settings: BucketSettings) -> Placement:
    """Return bucket, size after resizing and crop loss of an image of width × height pixels (upright).

    Raises BucketError `below_bucket_step` when a side would be shorter than one step.
    """
    if width < 1 or height < 1:
        raise BucketError("below_bucket_step", f"{width}x{height} pixels")
    if settings.family == "no_upscale":
        return _placement_without_upscale(width, height, settings.resolution_area, settings.step)
    buckets = listed_buckets(settings)
    exact = Bucket(width, height)
    return placement_in(width, height, exact if exact in buckets else nearest_bucket(width, height, buckets))


def placement_in(width: int, height: int, bucket: Bucket) -> Placement:
    """Return how an image covers a given bucket: resized until both sides reach it, the longer rest cropped."""
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, int(width * scale + 0.5))
    resized_height = max(bucket.height, int(height * scale + 0.5))
    return _placed(bucket, resized_width, resized_height)


def _placement_without_upscale(width: int, height: int, area: int, step: int) -> Placement:
    """The rule of kohya-ss sd-scripts' --bucket_no_upscale, with its rounding (half up, then floor to the step)."""
    resized_width, resized_height = width, height
    if width * height > area:
        ratio = width / height
        ideal_width = math.sqrt(area * ratio)
        ideal_height = area / ideal_width
        # A: floor the width, the height follows. B: floor the height. The smaller error of the ratio wins.
        width_a = _floor(ideal_width, step)
        height_a = _floor(width_a / ratio, step)
        height_b = _floor(ideal_height, step)
        width_b = _floor(height_b * ratio, step)
        if min(width_a, height_a, width_b, height_b) == 0:
            raise BucketError(
                "below_bucket_step",
                f"{width}x{height} fitted into {area:,} pixels is {ideal_width:.0f}x{ideal_height:.0f}",
            )
        if abs(width_a / height_a - ratio) < abs(width_b / height_b - ratio):
            resized_width, resized_height = width_a, int(width_a / ratio + 0.5)
        else:
            resized_width, resized_height = int(height_b * ratio + 0.5), height_b
    bucket = Bucket(resized_width // step * step, resized_height // step * step)
    if bucket.width == 0 or bucket.height == 0:
        raise BucketError("below_bucket_step", f"{resized_width}x{resized_height} has a side below {step}")
    return _placed(bucket, resized_width, resized_height)


def _floor(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _placed(bucket: Bucket, resized_width: int, resized_height: int) -> Placement:
    loss = 1 - bucket.width * bucket.height / (resized_width * resized_height)
    return Placement(bucket, resized_width, resized_height, loss)
