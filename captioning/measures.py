"""Plain measures of a picture, without a model: light, contrast, sharpness, borders, blocks, JPEG quality.

Pure functions of upright RGB pixels, and for JPEG quality of the file's bytes. Each gives one raw number; what is too
dark or too soft is a policy's to say.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin

_BORDER_TOLERANCE = 8
"""Levels by which a border's pixels may differ from its corner; compression leaves a few."""
_BLOCK = 8
_LUMINANCE = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
     51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
     101, 72, 92, 95, 98, 112, 100, 103, 99]
)  # fmt: skip
"""The luminance table of ITU-T T.81, Annex K.1, row by row; libjpeg scales it by quality."""


def brightness(image: Image.Image) -> float:
    """Return the mean luma (ITU-R BT.601), 0 black … 1 white."""
    return float(_luma(image).mean() / 255)


def contrast(image: Image.Image) -> float:
    """Return the standard deviation of luma, 0 flat … 1 half black, half white."""
    return float(_luma(image).std() / 127.5)


def sharpness(image: Image.Image) -> float:
    """Return the variance of the Laplacian of luma (4 neighbours, levels 0 … 255); 0 below 3 × 3 pixels.

    In the file's own pixels: an enlarged or soft picture is low. Source: Pech-Pacheco et al., 2000.
    """
    luma = _luma(image).astype(np.int16)
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    return float((4 * inner - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]).var())


def borders(image: Image.Image) -> float:
    """Return the share of the picture that is a plain frame or bars, 0 … 1; 1 for one colour or two halves.

    A line belongs to it while all its pixels are within 8 levels of the corner where the border starts.
    """
    pixels = np.asarray(image)
    top, bottom = _plain_lines(pixels), _plain_lines(pixels[::-1, ::-1])
    if top + bottom >= len(pixels):
        return 1.0
    inner = pixels[top : len(pixels) - bottom].swapaxes(0, 1)
    left, right = _plain_lines(inner), _plain_lines(inner[::-1, ::-1])
    kept = (len(pixels) - top - bottom) * max(len(inner) - left - right, 0)
    return float(1 - kept / (pixels.shape[0] * pixels.shape[1]))


def blockiness(image: Image.Image) -> float:
    """Return how much larger steps of luma are at the borders of 8 × 8 blocks than inside: 0 none, 1 twice as large.

    Only for pixels in the file's own grid: enlarged or cropped pictures hide their blocks. 0 below 16 pixels.
    """
    luma = _luma(image).astype(np.int16)
    edge, inside = np.zeros(2), np.zeros(2)
    for lines in (luma, luma.T):
        steps = np.abs(np.diff(lines, axis=1))
        is_edge = np.arange(1, steps.shape[1] + 1) % _BLOCK == 0
        edge += (steps[:, is_edge].sum(), steps[:, is_edge].size)
        inside += (steps[:, ~is_edge].sum(), steps[:, ~is_edge].size)
    if min(luma.shape) < 2 * _BLOCK or inside[0] == 0:
        return 0.0
    return float(max((edge[0] / edge[1]) / (inside[0] / inside[1]) - 1, 0))


def jpeg_quality(data: bytes) -> float | None:
    """Return libjpeg's quality, 1 … 100, whose luminance table is nearest to the file's; None for another format.

    Exact for files by libjpeg and everything that scales its tables; an estimate for those with tables of their own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the decoder has passed already
        file = Image.open(io.BytesIO(data))
    with file:
        if not isinstance(file, JpegImagePlugin.JpegImageFile) or not file.quantization:
            return None
        table = np.array(file.quantization[min(file.quantization)])
    distances = np.abs(_tables() - table).sum(axis=1)
    return float(100 - np.argmin(distances[::-1]))


def _tables() -> npt.NDArray[np.int64]:
    """Return libjpeg's luminance tables for quality 1 … 100, (100, 64)."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.asarray(np.clip((_LUMINANCE * scale[:, None] + 50) // 100, 1, 255))


def _luma(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image.convert("L"))


def _plain_lines(pixels: npt.NDArray[np.uint8]) -> int:
    """Return how many lines from the first are of the colour of the first pixel."""
    for number, line in enumerate(pixels):
        if np.abs(line.astype(np.int16) - pixels[0, 0]).max() > _BORDER_TOLERANCE:
            return number
    return len(pixels)
