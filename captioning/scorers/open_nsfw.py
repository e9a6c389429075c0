"""Yahoo's open_nsfw as an ONNX file: the probability that a photo is not safe for work, 0 … 1; higher is less safe.

Squashed to 256 × 256 bilinear, the middle 224 × 224, BGR 0 … 255 minus the mean of ImageNet, N x 224 x 224 x 3. The
network was trained on pictures that had been saved as JPEG in between, and its published scores need that step, too.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from captioning.model_files import ModelFilesSettings, locate_file
from captioning.onnx_session import OnnxSession, open_session
from captioning.plugin import Device, Identity, ModelError, Pixels, Row
from captioning.scorers.base import score_rows
from sharding.schema import SCORES

_RESIZED = 256
_MEAN_BGR = np.array([104, 117, 123], dtype=np.float32)


class Settings(ModelFilesSettings):
    """The network."""

    model: str
    """The .onnx file, or OWNER/NAME/FILE on the hub."""


@dataclass(frozen=True)
class JpegCrop:
    """Squash, cut the middle, save as JPEG (quality 75, 4:2:0) and read it again."""

    side: int

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (side, side, 3) uint8 BGR."""
        start = (_RESIZED - self.side) // 2
        resized = image.resize((_RESIZED, _RESIZED), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        resized.crop((start, start, start + self.side, start + self.side)).save(buffer, "JPEG")
        return np.ascontiguousarray(np.asarray(Image.open(buffer))[:, :, ::-1])

    @property
    def min_side(self) -> int:
        return _RESIZED


class OpenNsfw:
    """The loaded network."""

    def __init__(self, session: OnnxSession) -> None:
        self.preparer = JpegCrop(session.side)
        self.batch_size = session.batch_size
        self._session = session

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.SCORES rows; batch: (N, 224, 224, 3) uint8 BGR."""
        return score_rows(self._session.run(batch.astype(np.float32) - _MEAN_BGR)[:, 1])


def identify(settings: Settings) -> Identity:
    """Find the file. Raises ModelError."""
    _, revision = locate_file(settings.model, revision=settings.revision, key="model")
    return Identity(settings.model, revision, "squash-256-crop-jpeg/1", SCORES, licence=settings.licence)


def load(settings: Settings, *, device: Device) -> OpenNsfw:
    """Load the network. Raises ModelError."""
    path, _ = locate_file(settings.model, revision=settings.revision, key="model")
    session = open_session(path, device)
    if session.num_values not in (None, 2):
        raise ModelError(f"{path}: expected two values, safe and not safe, found {session.num_values}")
    return OpenNsfw(session)
