"""Where text is burnt into a picture: a heuristic for lines of thin strokes of one light or dark colour.

No recognition and no model. Finds subtitles, credits and signs of several letters; misses handwriting, single letters
and text without contrast, and takes railings or windows for text when they look like a line of letters.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

SHORT_SIDE = 540
"""Pixels to which a picture's shorter side is brought first: subtitles have letters of 20 to 40 there."""

_STROKE = 13  # pixels: wider strokes are no letters
_LIFT = 0.30  # luma by which a stroke stands out on both sides
_LIGHT, _DARK = 0.80, 0.20
_CELL = 6
_DENSITY = (0.08, 0.80)  # share of a letter's cells that are stroke
_GAP_CELLS = 4  # a space between two words
_HEIGHT_CELLS = (2, 9)
_MIN_ASPECT = 3.0
_MIN_STROKES_PER_HEIGHT = 0.5


@dataclass(frozen=True)
class TextBox:
    """A line of text; its sides as shares of the picture's."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


def find_text(image: Image.Image) -> list[TextBox]:
    """Return the lines of text in an RGB picture."""
    scale = SHORT_SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    grey = image.convert("L").resize(size, Image.Resampling.BILINEAR)
    luma = np.asarray(grey, np.float32) / 255
    opened = _extreme(_extreme(luma, np.minimum), np.maximum)
    closed = _extreme(_extreme(luma, np.maximum), np.minimum)
    light = (luma > _LIGHT) & (luma - opened > _LIFT)
    dark = (luma < _DARK) & (closed - luma > _LIFT)
    return [box for strokes in (light, dark) for box in _lines(strokes)]


def _extreme(luma: npt.NDArray[np.floating], pick: np.ufunc) -> npt.NDArray[np.floating]:
    """Return the smallest or largest luma of the square of _STROKE pixels around each pixel."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (_STROKE // 2, _STROKE // 2)
        padded = np.moveaxis(np.pad(luma, padding, mode="edge"), axis, 0)
        length = len(padded) - _STROKE + 1
        result = padded[:length].copy()
        for shift in range(1, _STROKE):
            pick(result, padded[shift : shift + length], out=result)
        luma = np.moveaxis(result, 0, axis)
    return luma


def _lines(strokes: npt.NDArray[np.bool_]) -> list[TextBox]:
    rows, columns = (side // _CELL for side in strokes.shape)
    cut = strokes[: rows * _CELL, : columns * _CELL].reshape(rows, _CELL, columns, _CELL)
    density = cut.mean(axis=(1, 3))
    is_text = (density > _DENSITY[0]) & (density < _DENSITY[1])
    boxes = []
    for top, bottom in _runs(is_text.mean(axis=1) > 0.08, gap=0):
        if not _HEIGHT_CELLS[0] <= bottom - top <= _HEIGHT_CELLS[1]:
            continue
        for left, right in _runs(is_text[top:bottom].mean(axis=0) > 0.3, gap=_GAP_CELLS):
            band = strokes[top * _CELL : bottom * _CELL, left * _CELL : right * _CELL]
            if (right - left) >= _MIN_ASPECT * (bottom - top) and _looks_written(band):
                boxes.append(TextBox(left / columns, top / rows, right / columns, bottom / rows))
    return boxes


def _looks_written(band: npt.NDArray[np.bool_]) -> bool:
    """Letters change between stroke and ground often along every row of the line."""
    begins = (band[:, 1:] & ~band[:, :-1]).sum(axis=1)
    middle = begins[len(begins) // 4 : -(len(begins) // 4) or None]
    return bool(np.median(middle) >= _MIN_STROKES_PER_HEIGHT * band.shape[1] / band.shape[0])


def _runs(flags: npt.NDArray[np.bool_], *, gap: int) -> list[tuple[int, int]]:
    """Return (first, behind the last) of runs of true; up to `gap` false ones do not end a run."""
    runs: list[tuple[int, int]] = []
    for place in np.flatnonzero(flags):
        if runs and place - runs[-1][1] <= gap:
            runs[-1] = (runs[-1][0], int(place) + 1)
        else:
            runs.append((int(place), int(place) + 1))
    return runs
