"""How alike two pictures are, without any network: whether a preview repeats a training picture, and how far a picture
has drifted from an earlier one of the same prompt and seed.

Both look at pixels. They find the same picture again (cropped, mirrored, brighter, repainted in another hue), not the
same character in another pose. Measured on real pictures in `verdict.toml`. numpy and PIL only.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]

SIDE = 16
"""Of the small picture that is compared: what is finer moves with every crop."""
KEPT_SIDE = 128
"""Pixels of the longer side that parts are cut from."""
_FREQUENCIES = 8
_SCALES = (1.0, 0.9, 0.8, 0.7)
_DRIFT_SIDE = 128
_SSIM_WINDOW = 8
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2
_FAR_COLOUR = 0.25  # of the range of a channel: as far apart as two pictures at random
_FLAT = 1e-3  # of the range of a channel: a picture without structure


def structure(picture: Image.Image) -> Floats:
    """Return (D,) the whole picture's structure, to be compared with `windows` of others; zeros for a flat one."""
    whole: Floats = _structures([_small(picture, (0.0, 0.0, float(picture.width), float(picture.height)))])[0]
    return whole


def windows(picture: Image.Image, *, ratio: float) -> Floats:
    """Return (W, D) the structures of parts of a picture, plain and mirrored, with the shape width / height = ratio.

    A part is the largest one of that shape or 0.9, 0.8, 0.7 of it, at the edges or in the middle.
    """
    grey = picture.convert("L")
    grey.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BOX)
    both = (grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return _structures([_small(one, box) for one in both for box in _boxes(*one.size, ratio)])


def likeness(one: Floats, parts: Floats) -> float:
    """Return how alike a picture (D,) and the nearest of the parts (W, D) of another are: 1 the same, about 0 nothing.

    The mean of two: the normalised correlation of luminance less its coarse shading, and the agreement in sign of the
    8 × 8 lowest frequencies (the bits of a perceptual hash; 1 − 2 × share of differing bits).
    """
    return float(likenesses(one, parts[None])[0])


def likenesses(one: Floats, pictures: Floats) -> Floats:
    """Return (N,) how alike a picture (D,) and each of N others (N, W, D) are, see `likeness`."""
    return np.asarray(np.maximum((pictures @ one).max(axis=1), 0.0), np.float32)


def drift(picture: Image.Image, base: Image.Image) -> float:
    """Return how far a picture is from an earlier one of the same prompt and seed: 0 the same, about 1 another picture.

    The mean of 1 − SSIM of luminance (Wang et al., "Image quality assessment", 2004; windows of 8 × 8 of 128 × 128
    pixels) and the mean distance of colours in windows of 16 × 16, as a share of what pictures at random have.
    """
    size = (_DRIFT_SIDE, _DRIFT_SIDE)
    a, b = (_values(one.convert("RGB").resize(size, Image.Resampling.BOX)) for one in (picture, base))
    colour = float(np.abs(_means(a, 16) - _means(b, 16)).mean()) / _FAR_COLOUR
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    return (1 - _ssim(a @ luma, b @ luma) + min(colour, 1.0)) / 2


def _ssim(a: Floats, b: Floats) -> float:
    """Return the structural similarity of luminance (H, W) in 0 … 1, clipped at 0."""

    def mean(values: Floats) -> Floats:
        parts = np.lib.stride_tricks.sliding_window_view(values, (_SSIM_WINDOW, _SSIM_WINDOW))[::2, ::2]
        return np.asarray(parts.mean(axis=(2, 3)), np.float32)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + _SSIM_C1) * (2 * both + _SSIM_C2)
    return max(float((top / ((mean_a**2 + mean_b**2 + _SSIM_C1) * (var_a + var_b + _SSIM_C2))).mean()), 0.0)


def _means(image: Floats, cell: int) -> Floats:
    """Return the mean colours (H / cell, W / cell, 3)."""
    height, width, channels = image.shape
    parts = image.reshape(height // cell, cell, width // cell, cell, channels)
    return np.asarray(parts.mean(axis=(1, 3)), np.float32)


def _boxes(width: int, height: int, ratio: float) -> Iterator[tuple[float, float, float, float]]:
    whole = (width, width / ratio) if width / height < ratio else (height * ratio, height)
    for scale in _SCALES:
        wide, high = max(whole[0] * scale, 1.0), max(whole[1] * scale, 1.0)
        for left in (0.0, (width - wide) / 2, width - wide):
            for top in (0.0, (height - high) / 2, height - high):
                yield (left, top, left + wide, top + high)


def _small(picture: Image.Image, box: tuple[float, float, float, float]) -> Floats:
    left, top, right, bottom = box
    inside = (max(left, 0.0), max(top, 0.0), min(right, picture.width), min(bottom, picture.height))
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=inside, reducing_gap=3.0)
    return _values(small)


def _values(picture: Image.Image) -> Floats:
    """Return the pixels in 0 … 1."""
    return np.asarray(np.asarray(picture, np.float32) / 255, np.float32)


def _structures(pictures: list[Floats]) -> Floats:
    """Return (N, D); a product of two of them is the mean of a correlation and of an agreement."""
    stack = np.stack(pictures)
    blur, cosines = _blur(), _cosines()
    fine = stack - blur @ stack @ blur.T
    fine -= fine.mean(axis=(1, 2), keepdims=True)
    lengths = np.sqrt((fine**2).sum(axis=(1, 2), keepdims=True))
    is_flat = (lengths < _FLAT * SIDE)[:, :, 0]
    fine = (fine / np.maximum(lengths, 1e-12)).reshape(len(stack), -1)
    spectrum = (cosines @ stack @ cosines.T)[:, :_FREQUENCIES, :_FREQUENCIES].reshape(len(stack), -1)[:, 1:]
    signs = np.where(spectrum > np.median(spectrum, axis=1, keepdims=True), 1.0, -1.0) / np.sqrt(spectrum.shape[1])
    both = np.concatenate([fine, signs], axis=1) / np.sqrt(2)
    return np.asarray(np.where(is_flat, 0.0, both), np.float32)


@lru_cache(maxsize=1)
def _blur() -> Floats:
    """Return (SIDE, SIDE): a Gaussian blur of a fifth of the side, as a product from the left."""
    distance = np.subtract.outer(np.arange(SIDE), np.arange(SIDE)) / (SIDE / 5)
    weights = np.exp(-(distance**2) / 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


@lru_cache(maxsize=1)
def _cosines() -> Floats:
    """Return (SIDE, SIDE): the discrete cosine transform of type II."""
    steps = np.arange(SIDE)
    return np.asarray(np.cos(np.pi * np.outer(steps, 2 * steps + 1) / (2 * SIDE)), np.float32)
