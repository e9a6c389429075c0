"""The wiki's table of valid ratios: which one a picture is cropped to, and where.

Knows no files. Sizes are in pixels, width first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.dreambooth.doctor.boxes import Box

_TALL = ((1, 1), (7, 8), (3, 4), (5, 8), (1, 2))
RATIOS = (*_TALL, *((tall, wide) for wide, tall in _TALL[1:]))
"""Of the wiki's "Valid Resolution", and their landscape inverses."""

_SIDE = 96  # pixels at which detail is looked at
_KEPT_WEIGHT = 8  # how much more than anything else a figure that was found weighs
_CENTRE_GAIN = 0.03  # a window off the centre must hold this much more


@dataclass(frozen=True)
class Ratio:
    """What a picture becomes: its size, and the share of its pixels that goes."""

    name: str
    width: int
    height: int
    loss: float


def nearest_ratio(width: int, height: int) -> Ratio:
    """Return the ratio of the table that is nearest, by |log ratio|, and the largest size of it that fits in."""
    across, down = min(RATIOS, key=lambda one: (abs(math.log(width * one[1] / (height * one[0]))), one))
    cut_width = min(width, round(height * across / down))
    cut_height = min(height, round(width * down / across))
    return Ratio(f"{across}:{down}", cut_width, cut_height, 1 - cut_width * cut_height / (width * height))


def crop_to(image: Image.Image, ratio: Ratio, *, keep: Sequence[Box] = ()) -> Image.Image:
    """Cut out the window of that size with the most detail, the middle one when it makes no difference.

    keep: figures that were found, which weigh more than detail.
    """
    if (ratio.width, ratio.height) == image.size:
        return image
    small = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    detail = np.abs(np.diff(small, axis=0, append=small[-1:])) + np.abs(np.diff(small, axis=1, append=small[:, -1:]))
    detail += 1e-3
    for box in keep:
        rows = slice(int(box.top * _SIDE), math.ceil(box.bottom * _SIDE))
        columns = slice(int(box.left * _SIDE), math.ceil(box.right * _SIDE))
        detail[rows, columns] += _KEPT_WEIGHT * float(detail.mean())
    left = _best_start(detail.sum(axis=0), image.width, ratio.width)
    top = _best_start(detail.sum(axis=1), image.height, ratio.height)
    return image.crop((left, top, left + ratio.width, top + ratio.height))


def _best_start(profile: np.ndarray, length: int, wanted: int) -> int:
    """Return where a window of `wanted` of `length` pixels begins that holds the most of a profile."""
    spare = length - wanted
    if spare == 0:
        return 0
    sums = np.concatenate([[0.0], np.cumsum(profile)])
    places = np.linspace(0, len(profile), len(profile) + 1)
    starts = np.unique(np.linspace(0, spare, min(spare, _SIDE) + 1).round().astype(int))
    held = [float(np.diff(np.interp([s * _SIDE / length, (s + wanted) * _SIDE / length], places, sums))[0])
            for s in starts]  # fmt: skip
    middle = int(np.argmin(np.abs(starts - spare / 2)))
    best = int(np.argmax(held))
    return int(starts[best]) if held[best] > held[middle] * (1 + _CENTRE_GAIN) else spare // 2
