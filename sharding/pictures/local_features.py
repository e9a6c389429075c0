"""A picture's local features: where its corners and blobs are and what is around them, in 1,002 bytes.

For finding crops: a part of a picture has some of the same features in the same arrangement. Corners and blobs are
found at all scales (maxima of the determinant of the Hessian), the strongest that are spread over the picture are
kept, and comparisons of the pixels around each become 64 bits. A thumbnail judges what the features propose. Features
are upright: a turned or mirrored picture has others.

Pure; which pictures are crops of each other is found by `crops`. Sources: Lindeberg, "Feature detection with automatic
scale selection", 1998; Brown, Szeliski, Winder, "Multi-image matching using multi-scale oriented patches", 2005
(spreading); Alcantarilla, Nuevo, Bartoli, "Fast explicit diffusion for accelerated features", 2013 (comparisons of
means and gradients over grids).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

FEATURES_VERSION = 1
"""Raised when the same picture would get other bytes."""
MIN_SIDE = 256
"""Pixels of the shorter side that are enough."""
NUM_POINTS = 64
SCALE_STEP = 2 ** (-1 / 3)
"""From one level of the pyramid to the next."""
STEPS_PER_LEVEL = 8
"""Resolution in which a point's level is stored."""
FEATURES = np.dtype(
    [
        ("size", "<u2", (2,)),  # width, height in working pixels: all pictures have the same area
        ("position", "u1", (NUM_POINTS, 2)),  # x, y in 256ths of width and height
        ("level", "u1", (NUM_POINTS,)),  # × STEPS_PER_LEVEL; NO_POINT where there are fewer points
        ("descriptor", "<u8", (NUM_POINTS,)),
        ("luma", "u1", (14, 14)),
        ("chroma", "u1", (2, 7, 7)),
    ]
)
"""What the bytes of one picture hold."""
NO_POINT = 255

_AREA = 96 * 1024
_MIN_LEVEL_SIDE = 20
_MARGIN = 6  # pixels of a level; nearer to the edge the surroundings are missing
_NUM_STRONGEST = 150
_MIN_RESPONSE = 0.05  # (grey levels / pixel²)²: far below JPEG noise, only to drop flat areas
_PATCH = 16
_RECORDS_AT_ONCE = 10_000
_GRIDS = (2, 3, 4)


def extract_features(image: Image.Image) -> bytes:
    """Return the features of an upright RGB picture: the bytes of one FEATURES record.

    A picture without structure has none, which is no error. Takes about 10 ms.
    """
    image = image.reduce(max(min(image.size) // MIN_SIDE, 1))
    levels, size = _pyramid(image)
    points = _spread_points(_find_points(levels, size))
    record = np.zeros((), FEATURES)
    record["size"] = size
    record["level"] = NO_POINT
    count = len(points)
    if count:
        record["position"][:count] = np.clip(points[:, :2] / size * 256, 0, 255)
        record["level"][:count] = np.round(points[:, 2] * STEPS_PER_LEVEL)
        record["descriptor"][:count] = _describe(_patches(levels, size, points))
    colours = image.resize((14, 14), Image.Resampling.BOX, reducing_gap=4.0).convert("YCbCr")
    record["luma"] = np.asarray(colours)[:, :, 0]
    record["chroma"] = np.asarray(colours.reduce(2))[:, :, 1:].transpose(2, 0, 1)
    return record.tobytes()


@dataclass(frozen=True)
class FeatureColumns:
    """The features of N pictures, a contiguous array per field of FEATURES, each (N, …)."""

    size: npt.NDArray[np.uint16]
    position: npt.NDArray[np.uint8]
    level: npt.NDArray[np.uint8]
    descriptor: npt.NDArray[np.uint64]
    luma: npt.NDArray[np.uint8]
    chroma: npt.NDArray[np.uint8]


def read_features(features: Sequence[bytes]) -> FeatureColumns:
    """Return what `extract_features` gave for each picture; empty bytes are a picture without points.

    Raises ValueError when bytes are of another length, as other versions'.
    """
    records = {
        name: np.empty((len(features), *FEATURES[name].shape), FEATURES[name].base) for name in FEATURES.names or ()
    }
    empty = np.zeros((), FEATURES)
    empty["level"], empty["size"] = NO_POINT, 1
    for start in range(0, len(features), _RECORDS_AT_ONCE):
        parts = [part or empty.tobytes() for part in features[start : start + _RECORDS_AT_ONCE]]
        if wrong := [len(part) for part in parts if len(part) != FEATURES.itemsize]:
            raise ValueError(
                f"local features of {wrong[0]} bytes, expected {FEATURES.itemsize}: they are of another version; "
                "run `python -m sharding scan` again"
            )
        joined = np.frombuffer(b"".join(parts), dtype=FEATURES)
        for name, column in records.items():
            column[start : start + len(parts)] = joined[name]
    return FeatureColumns(**records)


# --- finding points ---


def _pyramid(image: Image.Image) -> tuple[list[npt.NDArray[np.float32]], tuple[int, int]]:
    """Return smoothed grey levels, each SCALE_STEP smaller than the one before, and (width, height) of the first."""
    grey = image.convert("L")
    factor = (_AREA / (grey.width * grey.height)) ** 0.5
    width, height = (max(round(side * factor), _MIN_LEVEL_SIDE) for side in grey.size)
    base = grey.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0).convert("F")
    levels = []
    scale = 1.0
    while min(width, height) * scale >= _MIN_LEVEL_SIDE:
        size = (round(width * scale), round(height * scale))
        level = base if scale == 1.0 else base.resize(size, Image.Resampling.BICUBIC)
        levels.append(_blur(_blur(np.asarray(level, dtype=np.float32))))
        scale *= SCALE_STEP
    return levels, (width, height)


def _blur(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    for _ in range(2):  # once along each axis
        padded = np.pad(pixels, ((2, 2), (0, 0)), "edge")
        outer, inner = padded[:-4] + padded[4:], padded[1:-3] + padded[3:-1]
        pixels = ((outer + 4 * inner + 6 * padded[2:-2]) * np.float32(1 / 16)).T
    return pixels


def _find_points(levels: list[npt.NDArray[np.float32]], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return (N, 4): x, y in working pixels, level, response; the strongest first."""
    responses = [_hessian_determinant(level) for level in levels]
    maxima = [_largest_of_nine(response) for response in responses]
    found = [
        _points_of_level(responses[level], maxima[level - 1 : level + 2], level, size)
        for level in range(1, len(levels) - 1)
    ]
    points = np.concatenate([np.empty((0, 4)), *found])
    return points[np.argsort(-points[:, 3], kind="stable")]


def _hessian_determinant(level: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    response = np.zeros_like(level)
    middle = level[1:-1, 1:-1]
    xx = level[1:-1, 2:] - 2 * middle + level[1:-1, :-2]
    yy = level[2:, 1:-1] - 2 * middle + level[:-2, 1:-1]
    xy = (level[2:, 2:] - level[2:, :-2] - level[:-2, 2:] + level[:-2, :-2]) / 4
    response[1:-1, 1:-1] = xx * yy - xy * xy
    return response


def _largest_of_nine(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(H, W) → (H - 2, W - 2): the largest value around and at each inner pixel."""
    rows = np.maximum(np.maximum(values[:-2], values[2:]), values[1:-1])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 2:]), rows[:, 1:-1])


def _points_of_level(
    response: npt.NDArray[np.float32], maxima: list[npt.NDArray[np.float32]], level: int, size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Return (N, 4) points that are the largest of their 27 neighbours in place and scale."""
    height, width = response.shape
    is_point = (response[1:-1, 1:-1] >= maxima[1]) & (maxima[1] > _MIN_RESPONSE)
    margin = _MARGIN - 1
    is_point[:margin] = is_point[-margin:] = False
    is_point[:, :margin] = is_point[:, -margin:] = False
    y, x = np.nonzero(is_point)
    x, y = x + 1, y + 1
    around = []
    for other in (maxima[0], maxima[2]):
        rows, columns = other.shape[0] + 2, other.shape[1] + 2
        around.append(other[
            np.clip(((y + 0.5) * rows / height).astype(int) - 1, 0, rows - 3),
            np.clip(((x + 0.5) * columns / width).astype(int) - 1, 0, columns - 3),
        ])  # fmt: skip
    value = response[y, x]
    keep = (value >= around[0]) & (value >= around[1])
    x, y, value, finer, coarser = x[keep], y[keep], value[keep], around[0][keep], around[1][keep]
    across = x + 0.5 + _peak(response[y, x - 1], value, response[y, x + 1])
    down = y + 0.5 + _peak(response[y - 1, x], value, response[y + 1, x])
    return np.stack(
        [across / width * size[0], down / height * size[1], level + _peak(finer, value, coarser), value], axis=1
    )


def _peak(before: Any, at: Any, after: Any) -> Any:
    """Return where between -0.5 and 0.5 the parabola through three values has its peak."""
    curvature = np.minimum(before - 2 * at + after, -1e-9)
    return np.clip((before - after) / (2 * curvature), -0.5, 0.5)


def _spread_points(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keep NUM_POINTS of the strongest, those first that are far from any stronger one.

    Large points count as stronger: they survive re-encoding and scaling better.
    """
    points = points[np.argsort(-points[:, 3] * np.exp(0.1 * points[:, 2]), kind="stable")[:_NUM_STRONGEST]]
    if len(points) <= NUM_POINTS:
        return points
    strength = points[:, 3] * np.exp(0.1 * points[:, 2])
    squares = (points[:, None, 0] - points[None, :, 0]) ** 2 + (points[:, None, 1] - points[None, :, 1]) ** 2
    is_stronger = strength[None, :] * 0.9 > strength[:, None]
    radius = np.where(is_stronger, squares, np.inf).min(axis=1)
    return points[np.argsort(-radius, kind="stable")[:NUM_POINTS]]


# --- describing them ---


def _patches(
    levels: list[npt.NDArray[np.float32]], size: tuple[int, int], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Return (N, 16, 16) pixels around each point at its own scale, edge pixels repeated beyond the picture."""
    patches = np.empty((len(points), _PATCH, _PATCH), np.float32)
    nearest = np.clip(np.round(points[:, 2]).astype(int), 0, len(levels) - 1)
    offsets = np.arange(_PATCH) - (_PATCH - 1) / 2
    for number in np.unique(nearest):
        here = np.nonzero(nearest == number)[0]
        level = levels[number]
        height, width = level.shape
        steps = offsets * SCALE_STEP ** (number - points[here, 2])[:, None]
        x = np.clip((points[here, 0] / size[0] * width - 0.5)[:, None] + steps, 0, width - 1.001)
        y = np.clip((points[here, 1] / size[1] * height - 0.5)[:, None] + steps, 0, height - 1.001)
        left, top = x.astype(int), y.astype(int)
        right_share, bottom_share = (x - left)[:, None, :], (y - top)[:, :, None]
        left, top = left[:, None, :], top[:, :, None]
        upper = level[top, left] * (1 - right_share) + level[top, left + 1] * right_share
        lower = level[top + 1, left] * (1 - right_share) + level[top + 1, left + 1] * right_share
        patches[here] = upper * (1 - bottom_share) + lower * bottom_share
    return patches


_COMPARISONS = (
    281, 87, 276, 470, 11, 17, 292, 200, 261, 325, 16, 132, 90, 396, 472, 155, 102, 71, 65, 122, 454, 275, 162, 36,
    428, 74, 269, 267, 313, 251, 272, 284, 434, 218, 390, 115, 106, 308, 98, 12, 320, 56, 112, 126, 365, 461, 297,
    370, 227, 231, 386, 286, 332, 5, 259, 130, 477, 373, 304, 70, 274, 86, 239, 85,
)  # fmt: skip
"""Which of the 486 comparisons of `_compare_cells` make the descriptor: of those that change least when a picture is
cropped, enlarged and re-encoded, 64 that say different things (correlation below 0.46), in random order so that each
half is as good as the other. Chosen on 1,678 corresponding points of 149 wallpapers and photos."""


def _describe(patches: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Return 64 bits per patch."""
    bits = _compare_cells(patches)[:, list(_COMPARISONS)]
    packed = np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little"))
    words: npt.NDArray[np.uint64] = packed.view("<u8")[:, 0]
    return words


def _compare_cells(patches: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return (N, 486): which of two cells is larger, for all pairs of cells of a grid, in grey and its slopes."""
    inner = patches[:, 1:-1, 1:-1]
    across = patches[:, 1:-1, 2:] - patches[:, 1:-1, :-2]
    down = patches[:, 2:, 1:-1] - patches[:, :-2, 1:-1]
    bits = []
    for num_cells in _GRIDS:
        averaging = _cell_averages(num_cells)
        first, second = np.triu_indices(num_cells**2, 1)
        for values in (inner, across, down):
            cells = (averaging @ values @ averaging.T).reshape(len(patches), -1)
            bits.append(cells[:, first] > cells[:, second])
    return np.concatenate(bits, axis=1)


@cache
def _cell_averages(num_cells: int) -> npt.NDArray[np.float32]:
    """Return (cells, pixels): the matrix that averages the inner pixels of a patch into cells."""
    edges = np.round(np.linspace(0, _PATCH - 2, num_cells + 1)).astype(int)
    matrix = np.zeros((num_cells, _PATCH - 2), np.float32)
    for cell in range(num_cells):
        matrix[cell, edges[cell] : edges[cell + 1]] = 1 / (edges[cell + 1] - edges[cell])
    return matrix
