"""The two filters of OpenCV that kohya's tagger uses, INTER_AREA for shrinking and INTER_LANCZOS4, in numpy.

So that its tags can be had again without OpenCV. Pillow's filters of the same names sample differently; scores near a
threshold flip. Source: the formulas in OpenCV's documentation of resize. OpenCV 5.0 gives the same small pictures to
the last bit, and real ones but for one value in 20,000, by one level.
"""

import numpy as np
import numpy.typing as npt

from captioning.plugin import Pixels

_WEIGHT_BITS = 11
"""OpenCV rounds the weights of 8-bit pictures to so many bits and adds up integers."""


def area_mean(pixels: npt.NDArray[np.generic], length: int, *, axis: int) -> npt.NDArray[np.float32]:
    """Return means over `length` equal stretches of an axis; a pixel on a border counts for the share inside.

    pixels: (H, W, C); axis: 0 or 1. Shrinking both axes, then rounding, is INTER_AREA.
    """
    size = pixels.shape[axis]
    edges = np.arange(length + 1) * (size / length)
    starts, ends = edges[:-1], edges[1:]
    first = np.floor(starts).astype(np.int64)
    result = np.zeros((*pixels.shape[:axis], length, *pixels.shape[axis + 1 :]), dtype=np.float32)
    for tap in range(int((np.ceil(ends) - first).max())):
        place = first + tap
        share = np.clip(np.minimum(ends, place + 1) - np.maximum(starts, place), 0, None) * (length / size)
        weights = share.astype(np.float32).reshape(-1, *[1] * (pixels.ndim - 1 - axis))
        result += np.take(pixels, np.minimum(place, size - 1), axis=axis) * weights
    return result


def to_uint8(values: npt.NDArray[np.floating]) -> Pixels:
    """Round to the nearest, halves to even."""
    # Sums of fractions miss a half by a few bits.
    rounded: Pixels = np.clip(np.rint(np.round(values.astype(np.float64), 4)), 0, 255).astype(np.uint8)
    return rounded


def lanczos4(pixels: Pixels, length: int) -> Pixels:
    """Resize (H, W, C) uint8 to (length, length, C) with eight taps each way, edge pixels repeated."""
    rows, row_weights = _taps(pixels.shape[0], length)
    columns, column_weights = _taps(pixels.shape[1], length)
    across = np.zeros((pixels.shape[0], length, pixels.shape[2]), dtype=np.int64)
    for tap in range(8):
        across += pixels[:, columns[:, tap]].astype(np.int64) * column_weights[:, tap, None]
    result = np.zeros((length, length, pixels.shape[2]), dtype=np.int64)
    for tap in range(8):
        result += across[rows[:, tap]] * row_weights[:, tap, None, None]
    half = 1 << (2 * _WEIGHT_BITS - 1)
    rounded: Pixels = np.clip((result + half) >> (2 * _WEIGHT_BITS), 0, 255).astype(np.uint8)
    return rounded


def _taps(size: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the places and the integer weights of the taps of each new pixel, both (length, 8)."""
    centres = ((np.arange(length) + 0.5) * (size / length) - 0.5).astype(np.float32)
    first = np.floor(centres)
    distance = (centres - first)[:, None].astype(np.float64) + 3 - np.arange(8)
    weights = np.sinc(distance) * np.sinc(distance / 4)
    weights /= weights.sum(axis=1, keepdims=True)
    places = np.clip(first[:, None].astype(np.int64) - 3 + np.arange(8), 0, size - 1)
    return places, np.rint(weights * (1 << _WEIGHT_BITS)).astype(np.int64)
