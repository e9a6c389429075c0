"""A plain measure of the picture as a score, see captioning/measures.py. No model, nothing to load.

Measured in the decode workers, from the file's own pixels, so `annotate.min_side` must not be set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioning import measures
from captioning.plugin import FULL_SIZE, NOT_APPLICABLE, Device, Identity, ModelSettings, Row, empty_row
from captioning.scorers.base import score_rows
from sharding.schema import SCORES

Measure = Literal["brightness", "contrast", "sharpness", "borders", "blockiness", "jpeg_quality"]
_OF_PIXELS: dict[str, Callable[[Image.Image], float]] = {
    name: getattr(measures, name) for name in get_args(Measure) if name != "jpeg_quality"
}


class Settings(ModelSettings):
    """One of the measures."""

    measure: Measure
    """brightness, contrast and borders 0 … 1; sharpness from 0; blockiness from 0 (none); jpeg_quality 1 … 100, and
    status `not_applicable` for a file that is no JPEG."""


@dataclass(frozen=True)
class MeasurePreparer:
    """Measures instead of resizing."""

    measure: Measure
    min_side = FULL_SIZE

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float64]:
        """Return the number, shape ()."""
        return np.array(_OF_PIXELS[self.measure](image))


@dataclass(frozen=True)
class JpegPreparer:
    """Reads the quality from the file's tables."""

    min_side = 1

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float64]:
        """Return what stands for no quality: pixels alone have none."""
        return np.array(-1.0)

    def prepare_file(self, data: bytes, image: Image.Image) -> npt.NDArray[np.float64]:
        """Return the quality, or -1 for a file that is no JPEG, shape ()."""
        quality = measures.jpeg_quality(data)
        return np.array(-1.0 if quality is None else quality)


class MeasureScorer:
    """Hands on what was measured."""

    batch_size = None

    def __init__(self, measure: Measure) -> None:
        self.preparer = JpegPreparer() if measure == "jpeg_quality" else MeasurePreparer(measure)

    def predict(self, batch: npt.NDArray[np.float64]) -> list[Row]:
        """Return schema.SCORES rows; batch: (N,) numbers."""
        return [empty_row(SCORES, NOT_APPLICABLE) if number < 0 else score_rows([number])[0] for number in batch]


def identify(settings: Settings) -> Identity:
    """Say which measure it is."""
    return Identity(settings.measure, revision="1", preprocessing=f"{settings.measure}/1", schema=SCORES)


def load(settings: Settings, *, device: Device) -> MeasureScorer:
    """Return the scorer; it runs in the decode workers, on any device."""
    return MeasureScorer(settings.measure)
