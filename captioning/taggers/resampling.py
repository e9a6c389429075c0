"""The two filters of OpenCV that kohya's tagger uses, INTER_AREA for shrinking and INTER_LANCZOS4, in numpy.

So that its tags can be had again without OpenCV. Pillow's filters of the same names sample differently; scores near a
threshold flip. Source: the formulas in OpenCV's documentation of resize; checked against OpenCV 5.0.
"""

import numpy as np
import numpy.typing as npt

from captioning.plugin import Pixels

_BLOCK_LINES = 256
"""Lines whose sums are in memory at a time."""
_WEIGHT_BITS = 11
"""OpenCV rounds the weights of 8-bit pictures to so many bits and adds up integers."""


def area_mean(pixels: npt.NDArray[np.generic], length: int, *, axis: int) -> npt.NDArray[np.float64]:
    """Return means over `length` equal stretches of an axis; a pixel on a border counts for the share inside.

    pixels: (H, W, C); axis: 0 or 1. Shrinking both axes, then rounding, is INTER_AREA.
    """
    lines = pixels if axis == 0 else pixels.swapaxes(0, 1)
    blocks = range(0, lines.shape[1], _BLOCK_LINES)
    means = np.concatenate([_means(lines[:, start : start + _BLOCK_LINES], length) for start in blocks], axis=1)
    return means if axis == 0 else means.swapaxes(0, 1)


def _means(pixels: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.float64]:
    size = len(pixels)
    sums = np.zeros((size + 1, *pixels.shape[1:]))
    np.cumsum(pixels, axis=0, out=sums[1:])
    edges = np.arange(length + 1) * (size / length)
    whole = np.minimum(edges.astype(np.int64), size - 1)
    inside = (edges - whole).reshape(-1, *[1] * (pixels.ndim - 1))
    at_edges = sums[whole] + inside * (sums[whole + 1] - sums[whole])
    return np.asarray(np.diff(at_edges, axis=0) * (length / size))


def to_uint8(values: npt.NDArray[np.float64]) -> Pixels:
    """Round to the nearest, halves to even."""
    # Sums of fractions miss a half by a few bits.
    return np.clip(np.rint(np.round(values, 6)), 0, 255).astype(np.uint8)


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
