"""A picture in 4,000 bytes, and whether two of them differ in a place: the second look of dedupe.

A perceptual hash takes two expressions of a face, or two lines of text, for one picture. Their sketches differ in a
place by more than re-encoding, resizing or brightening does to the whole picture. Only for pairs that a hash found near
each other, or that show the same part: a picture and its crop differ everywhere, which says nothing here.

Knows nothing of files and hashes. A sketch is 80 × 80 grey levels in 4 bits (rows of two pixels a byte, the left one
high) and two 20 × 20 planes of chroma in 8 bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SKETCH_VERSION = 1
"""Raised when the same picture would get another sketch."""
MIN_SIDE = 256
"""Pixels of the shorter side that are enough."""

Planes = npt.NDArray[np.float32]

_SIDE = 80
_CHROMA_SIDE = 20
_NUM_BYTES = _SIDE * _SIDE // 2 + 2 * _CHROMA_SIDE * _CHROMA_SIDE
_PAIRS_AT_ONCE = 256
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]

# Chosen by measurement on real pictures (see the class DedupeConfig, keep_variants): finer grey levels would cost the
# resolution that a mouth needs.
_MAX_LOCAL = 15.0  # grey levels by which a place may differ beyond what the whole picture does
_NOISE_WEIGHT = 12.0  # a picture that differs by d on average may differ by 12 d in a place
_NEIGHBOUR_SHARE = 0.5  # pixels may have moved by half a sketch pixel
_CLIPPED_ALLOWANCE = 30.0  # a brightened pixel that reached white has lost what it was


def make_sketch(image: Image.Image) -> bytes:
    """Return the sketch of an upright RGB picture: 4,000 bytes. Aspect is not kept."""
    image = image.reduce(max(min(image.size) // MIN_SIDE, 1))
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX).convert("YCbCr")
    levels = np.asarray(small)[:, :, 0] >> 4
    chroma = np.asarray(small.resize((_CHROMA_SIDE, _CHROMA_SIDE), Image.Resampling.BOX))[:, :, 1:]
    return (levels[:, ::2] << 4 | levels[:, 1::2]).tobytes() + chroma.transpose(2, 0, 1).tobytes()


def is_variant(left: bytes, right: bytes) -> bool:
    """Tell whether two sketches differ in a place, beyond what re-encoding, resizing and brightness do.

    Raises ValueError for bytes that are no sketch of this version.
    """
    return bool(are_variants([left], [right])[0])


def are_variants(lefts: Sequence[bytes], rights: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Tell it for each pair (lefts[i], rights[i]), as `is_variant` does. About 2 ms a pair."""
    if len(lefts) != len(rights):
        raise ValueError(f"{len(lefts)} sketches cannot be compared with {len(rights)}, one by one")
    result = np.zeros(len(lefts), dtype=bool)
    for start in range(0, len(lefts), _PAIRS_AT_ONCE):
        here = slice(start, start + _PAIRS_AT_ONCE)
        result[here] = _local_difference(_to_rgb(lefts[here]), _to_rgb(rights[here])) > _MAX_LOCAL
    return result


def _to_rgb(sketches: Sequence[bytes]) -> Planes:
    """Return (N, 3, 80, 80): the sketches as colours, 0 to 255."""
    if wrong := [len(sketch) for sketch in sketches if len(sketch) != _NUM_BYTES]:
        raise ValueError(
            f"a sketch of {wrong[0]} bytes, expected {_NUM_BYTES}: it is of another version; "
            "run `python -m sharding scan` again"
        )
    data = np.frombuffer(b"".join(sketches), np.uint8).reshape(len(sketches), _NUM_BYTES)
    packed = data[:, : _SIDE * _SIDE // 2].reshape(-1, _SIDE, _SIDE // 2)
    luma = np.stack([packed >> 4, packed & 15], axis=3).reshape(-1, _SIDE, _SIDE) * np.float32(16) + np.float32(7.5)
    chroma = data[:, _SIDE * _SIDE // 2 :].reshape(-1, 2, _CHROMA_SIDE, _CHROMA_SIDE).astype(np.float32) - 128
    blue, red = np.moveaxis(chroma.repeat(_SIDE // _CHROMA_SIDE, axis=2).repeat(_SIDE // _CHROMA_SIDE, axis=3), 1, 0)
    # JPEG's conversion (ITU-T T.871).
    colours = np.stack([luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue], axis=1)
    rgb: Planes = np.clip(colours, 0, 255).astype(np.float32)
    return rgb


def _local_difference(left: Planes, right: Planes) -> npt.NDArray[np.float32]:
    """Return, per pair of (N, 3, 80, 80), how much the worst 2 × 2 place differs beyond the picture as a whole."""
    gain, offset = _fit_brightness(left, right)
    # The darker one is brightened, since what was clipped at white cannot come back.
    is_darker = (gain < 1)[:, None, None, None]
    left, right = np.where(is_darker, right, left), np.where(is_darker, left, right)
    offset, gain = np.where(gain < 1, -offset / gain, offset), np.where(gain < 1, 1 / gain, gain)
    brightened = gain[:, None, None, None] * right + offset[:, None, None, None]
    expected, actual = (np.clip(brightened, 0, 255) * _LUMA).sum(axis=1), (left * _LUMA).sum(axis=1)
    difference = np.maximum(_outside_range(actual, expected), _outside_range(expected, actual))
    is_clipped = (brightened.max(axis=1) > 250) & (gain > 1.1)[:, None, None]
    difference = np.where(is_clipped, np.maximum(difference - _CLIPPED_ALLOWANCE, 0), difference)
    blocks = difference[:, 1:, 1:] + difference[:, 1:, :-1] + difference[:, :-1, 1:] + difference[:, :-1, :-1]
    worst: npt.NDArray[np.float32] = blocks.max(axis=(1, 2)) / 4 - _NOISE_WEIGHT * difference.mean(axis=(1, 2))
    return worst


def _fit_brightness(left: Planes, right: Planes) -> tuple[Any, Any]:
    """Return (gain, offset) per pair so that left ≈ gain × right + offset in most unclipped pixels."""
    grey, other = (left * _LUMA).sum(axis=1), (right * _LUMA).sum(axis=1)
    is_usable = (left.max(axis=1) < 245) & (right.max(axis=1) < 245) & (grey > 8) & (other > 8)
    gain, offset = np.ones(len(left), np.float32), np.zeros(len(left), np.float32)
    is_fitted = is_usable
    for _ in range(4):
        count = is_fitted.sum(axis=(1, 2)) + 1e-3
        mean, other_mean = (grey * is_fitted).sum(axis=(1, 2)) / count, (other * is_fitted).sum(axis=(1, 2)) / count
        away = (other - other_mean[:, None, None]) * is_fitted
        # The added constant keeps the gain of a nearly flat picture at 1.
        slope = ((away * grey).sum(axis=(1, 2)) + 4 * count) / ((away * away).sum(axis=(1, 2)) + 4 * count)
        slope = np.clip(slope, 0.5, 2)
        gain = np.where(count > 50, slope, 1)
        offset = np.where(count > 50, mean - slope * other_mean, 0)
        error = np.abs(grey - gain[:, None, None] * other - offset[:, None, None])
        # The worst 30 % may be what differs, and must not bend the fit.
        error_of_usable = np.sort(np.where(is_usable, error, np.inf).reshape(len(left), -1), axis=1)
        place = (0.7 * is_usable.sum(axis=(1, 2))).astype(int)
        limit = np.maximum(error_of_usable[np.arange(len(left)), np.minimum(place, error.shape[1] ** 2 - 1)], 6)
        is_fitted = is_usable & (error <= limit[:, None, None])
    return gain, offset


def _outside_range(values: Planes, reference: Planes) -> Planes:
    """Return by how much values lie outside what half a pixel's shift would make of the reference, per pixel."""
    padded = np.pad(reference, ((0, 0), (1, 1), (1, 1)), "edge")
    shifts = [(y, x) for y in range(3) for x in range(3)]
    neighbours = [padded[:, y : y + _SIDE, x : x + _SIDE] for y, x in shifts]
    lowest, highest = np.minimum.reduce(neighbours), np.maximum.reduce(neighbours)
    share = np.float32(_NEIGHBOUR_SHARE)
    low, high = reference + share * (lowest - reference), reference + share * (highest - reference)
    outside: Planes = np.maximum(np.maximum(values - high, low - values), 0)
    return outside
