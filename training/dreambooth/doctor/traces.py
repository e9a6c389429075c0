"""What a file's history left in its pixels: enlargement, stretching one way, JPEG compression.

Measured on the file as it is, not at the size it is trained in: resizing wipes these traces out, or makes them.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Plane = npt.NDArray[np.floating]

_WINDOW = 256  # pixels a spectrum is taken of
_ROWS = 400
_DROP = 0.05  # of the power at low frequencies: below it there is nothing left
_SMOOTH = 7
_INTACT = 0.9  # share of the spectrum that a picture of its own size fills
_ROLL_OFF = (
    0.72  # of where the spectrum ends: an enlarged picture's own pixels (bilinear, bicubic and Lanczos, 2 and 3 times)
)
_BLOCK = 8
_EDGE = 0.03  # luma: steps above it belong to the picture
_BUSY = 1.5 / 255  # luma of three steps together: below it a place is flat, which no compression changes
_MIN_BUSY = 0.1  # share of a picture
# ITU-T T.81, table K.1: what a JPEG of quality 50 divides luma by.
_STANDARD = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip


@dataclass(frozen=True)
class Traces:
    """What was measured."""

    detail: float
    """Share of its sides that a picture without loss would need for what it shows: 1, or 0.5 when enlarged twice."""
    stretch: float
    """How much further its detail reaches one way than the other; 1 when both are alike, or neither is intact: a blur
    may be uneven, too."""
    blockiness: float
    """Steps at the borders of 8 x 8 blocks beyond those inside of them, in levels of 255."""
    jpeg_quality: int | None
    """As libjpeg counts; None for other formats."""


def find_traces(image: Image.Image, data: bytes) -> Traces:
    """Measure a decoded RGB picture, and the file that it was."""
    luma = np.asarray(image.convert("L"), np.float32) / 255
    across, down = _spectrum_end(luma), _spectrum_end(luma.T)
    widest = max(across, down)
    return Traces(
        detail=1.0 if widest >= _INTACT else _ROLL_OFF * widest,
        stretch=widest / min(across, down) if widest >= _INTACT else 1.0,
        blockiness=min(_blockiness(luma), _blockiness(luma.T)),
        jpeg_quality=_jpeg_quality(data),
    )


def _spectrum_end(luma: Plane) -> float:
    """Return at which share of the highest frequency along the rows the power first falls to nothing.

    Of differences, whose spectrum is even for drawings and photographs; of the busier half of the picture.
    """
    height, width = luma.shape
    window = min(_WINDOW, width)
    rows = luma[:: max(1, height // _ROWS)]
    pieces = np.concatenate([rows[:, start : start + window] for start in range(0, width - window + 1, window)])
    steps = np.diff(pieces, axis=1)
    energy = np.square(steps).mean(axis=1)
    busy = steps[energy >= np.median(energy)] * np.hanning(window - 1).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(busy, axis=1))).mean(axis=0)
    if len(power) < 4 * _SMOOTH or not power.any():
        return 1.0  # too small to tell, or of one colour
    smooth = np.convolve(np.pad(power, _SMOOTH // 2, mode="edge"), np.ones(_SMOOTH) / _SMOOTH, mode="valid")
    low = max(_between(smooth, 0.06, 0.25), _between(smooth, 0.02, 0.08) / 2)  # the second for what is enlarged 5 times
    begin = int(0.1 * len(smooth))
    gone = np.flatnonzero(smooth[begin:] < _DROP * low)
    return float((begin + gone[0]) / (len(smooth) - 1)) if len(gone) else 1.0


def _between(power: Plane, first: float, last: float) -> float:
    return float(np.median(power[int(first * len(power)) : int(last * len(power))]))


def _blockiness(luma: Plane) -> float:
    """Compare steps at the borders of blocks with their neighbours, where there are steps at all."""
    steps = np.abs(np.diff(luma, axis=1))
    near = steps[:, 1:-1] + steps[:, :-2] + steps[:, 2:]
    is_busy = near > _BUSY
    beyond = np.clip(1.5 * steps[:, 1:-1] - near / 2, -_EDGE, _EDGE) * is_busy
    length = beyond.shape[1] // _BLOCK * _BLOCK
    if not length:
        return 0.0
    columns = beyond[:, :length].mean(axis=0).reshape(-1, _BLOCK).mean(axis=0)
    at_border = _BLOCK - 2  # the step from pixel 7 to pixel 8 is the 8th; the first one has no neighbour
    difference = float(columns[at_border] - np.delete(columns, at_border).mean())
    return difference * 255 / max(float(is_busy.mean()), _MIN_BUSY)


def _jpeg_quality(data: bytes) -> int | None:
    with Image.open(io.BytesIO(data)) as image:
        tables = getattr(image, "quantization", None)
    if not tables:
        return None
    scale = 100 * sum(tables[0]) / sum(_STANDARD)
    quality = (200 - scale) / 2 if scale <= 100 else 5000 / scale
    return int(min(100.0, max(1.0, quality)) + 0.5)
