"""Numbers of one picture's pixels: sharpness, light, contrast, colour cast, bars at the border.

Knows no limits and no files. A picture is measured as it will be trained: resized and cropped to its bucket.
Luma and channels are float32 from 0 to 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Plane = npt.NDArray[np.floating]

BRIGHT = 0.97
"""Luma above which a pixel is white."""
CLIPPED = 0.985
"""What a channel has when it has lost what it showed."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BLUR_PIXELS = 9  # of the paper
_COARSE = 8  # pixels a cell: a background connected to the border is followed in cells
_GROUND_SHARE = 0.6  # of the border: what a drawing's white ground takes at least
_BAR_STD = 2.5 / 255  # a bar of a JPEG is not quite constant
_BAR_DRIFT = 4 / 255
_BAR_ROWS = 24
_BAR_EDGE = 4 / 255  # luma by which the first row of the picture leaves the bar …
_BAR_EDGE_SHARE = 0.6  # … in this share of its pixels; a drawing on a plain ground leaves it in few
_CAST_ONE = 0.35
_BLACK = 0.03  # luma
_MIN_FIGURE = 0.1  # of the picture: less than that beside a black ground is no figure
_PALE = 0.65  # mean of the channels: pure orange is at the end of one, and is not burnt


@dataclass(frozen=True)
class PixelNumbers:
    """What was measured, each from 0 to 1."""

    blur: float
    """How little is lost by blurring once more: 0 sharp, 1 without any detail."""
    mean_luma: float
    lit_luma: float
    """Mean luma without a black ground that reaches the border all around: a figure on black is not dark."""
    burnt_fraction: float
    """Pixels with a channel at its end (CLIPPED) that do not belong to a white ground which reaches the border."""
    contrast: float
    """Luma of the 99th less that of the 1st percentile."""
    cast: float
    """Distance between the channels' black points and between their white points, the smaller one. A coloured scene
    mostly has one of them; _CAST_ONE of the larger one counts, too."""


def measure(image: Image.Image) -> PixelNumbers:
    """Measure an RGB picture at the size it is trained in."""
    rgb = np.asarray(image, np.float32) / 255
    luma = rgb @ _LUMA
    low, high = np.percentile(luma, (1, 99))
    return PixelNumbers(
        blur=blur_of(luma),
        mean_luma=float(luma.mean()),
        lit_luma=_lit_luma(luma),
        burnt_fraction=_burnt_fraction(rgb, luma),
        contrast=float(high - low),
        cast=_cast(rgb),
    )


def blur_of(luma: Plane) -> float:
    """Return how little of the differences between neighbours a further blur takes away, of the worse direction.

    Judges edges, not their number: flat art and busy photographs are measured alike. 1 for a picture of one colour.
    Source: Crété-Roffet et al., "The blur effect: perception and estimation with a new no-reference perceptual blur
    metric", SPIE 2007, equations 1 to 6 (its strong blur: a mean of 9 pixels).
    """
    return max(_blur_along(luma), _blur_along(luma.T))


def _blur_along(luma: Plane) -> float:
    sums = np.cumsum(np.pad(luma, ((0, 0), (_BLUR_PIXELS // 2 + 1, _BLUR_PIXELS // 2)), mode="edge"), axis=1)
    blurred = (sums[:, _BLUR_PIXELS:] - sums[:, :-_BLUR_PIXELS]) / _BLUR_PIXELS
    before = np.abs(np.diff(luma, axis=1))
    after = np.abs(np.diff(blurred, axis=1))[:, -before.shape[1] :]
    total = float(before.sum())
    return 1.0 if total == 0 else float(1 - np.maximum(0, before - after).sum() / total)


def _lit_luma(luma: Plane) -> float:
    cells, is_black = (_in_cells(part) for part in (luma, luma < _BLACK))
    ground = _ground(is_black > 0.5)
    return float(cells[~ground].mean()) if (~ground).mean() > _MIN_FIGURE else float(luma.mean())


def _in_cells(part: npt.NDArray[Any]) -> Plane:
    rows, columns = (side // _COARSE for side in part.shape)
    cut = part[: rows * _COARSE, : columns * _COARSE].reshape(rows, _COARSE, columns, _COARSE)
    return np.asarray(cut.mean(axis=(1, 3)))


def _ground(is_candidate: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the candidates that reach the border, if they take most of it: a burnt sky is not all around."""
    border = np.concatenate([is_candidate[0], is_candidate[-1], is_candidate[:, 0], is_candidate[:, -1]])
    return _reaching_border(is_candidate) if border.mean() > _GROUND_SHARE else np.zeros_like(is_candidate)


def _burnt_fraction(rgb: Plane, luma: Plane) -> float:
    """The white ground of a drawing is no fault: bright cells that reach the border through each other are left out."""
    burnt = (rgb.max(axis=2) > CLIPPED) & (rgb.mean(axis=2) > _PALE)
    cells, is_white = (_in_cells(part) for part in (burnt, luma > BRIGHT))
    ground = _ground(is_white > 0.5)
    return float(cells[~ground].sum() / cells.size)


def _reaching_border(is_candidate: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    found = np.zeros_like(is_candidate)
    for edge in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
        found[edge] = is_candidate[edge]
    while True:
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        grown &= is_candidate
        if (grown == found).all():
            return found
        found = grown


def _cast(rgb: Plane) -> float:
    points = np.percentile(rgb.reshape(-1, 3), (1, 99), axis=0)
    apart = points.max(axis=1) - points.min(axis=1)
    return float(max(apart.min(), _CAST_ONE * apart.max()))


@dataclass(frozen=True)
class Bars:
    """Rows and columns of one colour at the border, as shares of the sides."""

    top: float
    bottom: float
    left: float
    right: float

    @property
    def largest(self) -> float:
        return max(self.top, self.bottom, self.left, self.right)


def find_bars(image: Image.Image) -> Bars:
    """Find bars around an RGB picture that ends at them all along, as letterboxes and scanned borders do.

    The ground of a drawing is none: there the picture begins in few places of a row.
    """
    rgb = np.asarray(image.convert("RGB"))
    top, bottom = _bar_rows(rgb), _bar_rows(rgb[::-1])
    height, width = rgb.shape[:2]
    middle = rgb[top : height - bottom]
    sideways = middle.transpose(1, 0, 2)
    left, right = _bar_rows(sideways), _bar_rows(sideways[::-1])
    return Bars(top / height, bottom / height, left / width, right / width)


def _bar_rows(rgb: npt.NDArray[np.uint8]) -> int:
    """Count rows of one colour from the top, up to a clear edge; 0 when there is none."""
    count = _plain_rows(rgb) if rgb.size else 0
    if count in (0, len(rgb)):
        return 0
    # Resizing and compression blur the edge over a few rows. Of a drawn sky's gradient no row leaves the one before.
    outside, inside = (_levels(rgb[row : row + 1]) for row in (count - 1, min(count + 3, len(rgb) - 1)))
    differs = np.abs(inside - outside.mean(axis=1)).max(axis=2) > _BAR_EDGE
    return count if differs.mean() > _BAR_EDGE_SHARE else 0


def _plain_rows(rgb: npt.NDArray[np.uint8]) -> int:
    """Count the rows from the top that have the first one's colour, a few at a time: most pictures have none."""
    first = _levels(rgb[:1]).mean(axis=1)
    for start in range(0, len(rgb), _BAR_ROWS):
        rows = _levels(rgb[start : start + _BAR_ROWS])
        drift = np.abs(rows.mean(axis=1) - first).max(axis=1)
        is_bar = (rows.std(axis=1).max(axis=1) < _BAR_STD) & (drift < _BAR_DRIFT)
        if not is_bar.all():
            return start + int(np.argmin(is_bar))
    return len(rgb)


def _levels(rows: npt.NDArray[np.uint8]) -> Plane:
    return rows.astype(np.float32) / 255
