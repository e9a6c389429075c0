"""Assign images to resolution buckets: which size a picture is resized to, and what is cropped off.

Pure functions, no torch. Buckets depend on a run's resolution, so they are computed at training time and never
stored. Which buckets there are is in `bucket_list`; which pixels are cut is decided in `chunk_data`.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from training.bucket_list import STABLE_CASCADE_RATIOS, Bucket, BucketSettings, listed_buckets

__all__ = [
    "STABLE_CASCADE_RATIOS",
    "Bucket",
    "BucketError",
    "BucketSettings",
    "Placement",
    "listed_buckets",
    "nearest_bucket",
    "placement",
    "placement_in",
    "ratio_distance",
]


class BucketError(ValueError):
    """An image has no bucket. `reason` is a snake_case drop reason, `detail` the evidence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image gets into its bucket: resized to (resized_width, resized_height), then cropped to the bucket."""

    bucket: Bucket
    resized_width: int
    resized_height: int
    crop_loss_fraction: float
    """Share of the resized image's pixels that the crop cuts off."""


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

    Raises BucketError `below_bucket_step` when a side would be shorter than one step, and `below_min_side` when
    `no_upscale` would need a bucket shorter than min_side.
    """
    if width < 1 or height < 1:
        raise BucketError("below_bucket_step", f"{width}x{height} pixels")
    if settings.family == "no_upscale":
        return _placement_without_upscale(width, height, settings)
    buckets = _Ratios.of(settings)
    exact = Bucket(width, height)
    return placement_in(width, height, exact if exact in buckets.all else buckets.nearest(width, height))


def placement_in(width: int, height: int, bucket: Bucket) -> Placement:
    """Return how an image covers a given bucket: resized until both sides reach it, the longer rest cropped."""
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, int(width * scale + 0.5))
    resized_height = max(bucket.height, int(height * scale + 0.5))
    return _placed(bucket, resized_width, resized_height)


@dataclass(frozen=True)
class _Ratios:
    """A family's list, ordered so that the nearest ratio is found without looking at all."""

    all: frozenset[Bucket]
    logarithms: tuple[float, ...]
    buckets: tuple[Bucket, ...]

    @staticmethod
    @lru_cache(maxsize=16)
    def of(settings: BucketSettings) -> "_Ratios":
        ordered = sorted(listed_buckets(settings), key=lambda b: (math.log(b.width / b.height), b))
        logarithms = tuple(math.log(b.width / b.height) for b in ordered)
        return _Ratios(frozenset(ordered), logarithms, tuple(ordered))

    def nearest(self, width: int, height: int) -> Bucket:
        """Return what nearest_bucket gives, of the entries within rounding of the two next to the ratio."""
        ratio = math.log(width / height)
        above = min(bisect_left(self.logarithms, ratio), len(self.logarithms) - 1)
        reach = min(abs(self.logarithms[index] - ratio) for index in (max(above - 1, 0), above)) + 1e-9
        first, last = (bisect_left(self.logarithms, limit) for limit in (ratio - reach, ratio + reach))
        return nearest_bucket(width, height, self.buckets[first:last])


def _placement_without_upscale(width: int, height: int, settings: BucketSettings) -> Placement:
    """The rule of kohya-ss sd-scripts' --bucket_no_upscale, with its rounding (half up, then floor to the step).

    A longest side bounds the area, too: the one at which an image of this ratio is as long as that.
    """
    step, (shortest, longest) = settings.step, settings.bounds
    ratio = width / height
    area = min(settings.resolution_area, longest * longest * min(ratio, 1 / ratio))
    resized_width, resized_height = width, height
    if width * height > area:
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
                f"{width}x{height} fitted into {area:,.0f} pixels is {ideal_width:.0f}x{ideal_height:.0f}",
            )
        if abs(width_a / height_a - ratio) < abs(width_b / height_b - ratio):
            resized_width, resized_height = width_a, int(width_a / ratio + 0.5)
        else:
            resized_width, resized_height = int(height_b * ratio + 0.5), height_b
    bucket = Bucket(resized_width // step * step, resized_height // step * step)
    if bucket.width == 0 or bucket.height == 0:
        raise BucketError("below_bucket_step", f"{resized_width}x{resized_height} has a side below {step}")
    if min(bucket.width, bucket.height) < shortest:
        raise BucketError("below_min_side", f"{resized_width}x{resized_height} has a side below {shortest}")
    return _placed(bucket, resized_width, resized_height)


def _floor(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _placed(bucket: Bucket, resized_width: int, resized_height: int) -> Placement:
    loss = 1 - bucket.width * bucket.height / (resized_width * resized_height)
    return Placement(bucket, resized_width, resized_height, loss)
