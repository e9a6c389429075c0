"""WD tagger v2/v3 (SmilingWolf): `model.onnx` and `selected_tags.csv`.

The models want BGR, 0 … 255 as float32, NHWC, no mean and no standard deviation, the picture padded to a square with
white and then resized; anything else gives plausible but wrong tags without an error. The output is already a
probability. Alpha lies on white and EXIF rotation is applied by the decoder.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.model_files import locate
from captioning.onnx_session import OnnxSession, open_session
from captioning.plugin import Device, Identity, ModelError, Pixels, Row
from captioning.taggers.base import Label, TaggerSettings, label_table, rating_columns, tagger_rows
from sharding.schema import TAGGER

MODEL_FILE = "model.onnx"
TAGS_FILE = "selected_tags.csv"
_CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
_VERSION = "wd/demo/1"
"""Pad to a square with white, then bicubic: the model author's demo. Other programs' filters are other versions."""


class Settings(TaggerSettings):
    """A tagger of the WD family."""

    model: str
    """Folder with model.onnx and selected_tags.csv, or a hub id."""


@dataclass(frozen=True)
class SquarePreparer:
    """Pad to a square with white, resize bicubic, RGB → BGR. Source: the model author's demo."""

    side: int

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (side, side, 3) uint8 BGR."""
        width, height = image.size
        longest = max(width, height)
        if width > height:
            # Pillow resizes rows first and columns of the result afterwards. White rows stay white in the first pass,
            # so it can be done before they are added: same pixels, without a square of camera size.
            image = image.resize((self.side, height), Image.Resampling.BICUBIC)
        if width != height:
            padded = Image.new("RGB", (image.width if width > height else longest, longest), (255, 255, 255))
            padded.paste(image, ((padded.width - image.width) // 2, (longest - height) // 2))
            image = padded
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])

    @property
    def min_side(self) -> int:
        return self.side


class WdTagger:
    """A loaded WD tagger."""

    def __init__(self, session: OnnxSession, *, labels: list[Label], floor: float) -> None:
        self.preparer = SquarePreparer(session.side)
        self.batch_size = session.batch_size
        self._session = session
        self._rating_ids = rating_columns(labels)
        self._tag_ids = np.array([n for n, label in enumerate(labels) if label.category != "rating"], dtype=np.int32)
        self._num_labels = len(labels)
        self._floor = floor

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.TAGGER rows; batch: (N, side, side, 3) uint8 BGR. Raises ModelError."""
        probs = self._session.run(batch.astype(np.float32))
        if probs.shape != (len(batch), self._num_labels):
            raise ModelError(
                f"the tagger gives {probs.shape[-1]} values, {TAGS_FILE} names {self._num_labels}: "
                "model and label file do not belong together"
            )
        return tagger_rows(probs, rating_ids=self._rating_ids, tag_ids=self._tag_ids, floor=self._floor)


def identify(settings: Settings) -> Identity:
    """Find the model's files and read its labels. Raises ModelError."""
    folder, revision = locate(settings.model, revision=settings.revision, patterns=[MODEL_FILE, TAGS_FILE])
    return Identity(
        model=settings.model,
        revision=revision,
        preprocessing=_VERSION,
        schema=TAGGER,
        licence=settings.licence,
        settings={"floor": settings.floor},
        labels=label_table(read_labels(folder / TAGS_FILE)),
    )


def load(settings: Settings, *, device: Device) -> WdTagger:
    """Load the model. Raises ModelError (MissingExtraError without onnxruntime)."""
    folder, _ = locate(settings.model, revision=settings.revision, patterns=[MODEL_FILE, TAGS_FILE])
    labels = read_labels(folder / TAGS_FILE)
    return WdTagger(open_session(folder / MODEL_FILE, device), labels=labels, floor=settings.floor)


def read_labels(path: Path) -> list[Label]:
    """Read selected_tags.csv (tag_id, name, category, count), in the order of the outputs. Raises ModelError.

    The csv module, not a table reader: tags such as `null` or `nan` are words.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a WD tagger is {MODEL_FILE} and {TAGS_FILE} in one folder") from None
    if not rows or "name" not in rows[0] or "category" not in rows[0]:
        raise ModelError(f"{path}: expected the columns tag_id, name, category, count")
    unknown = sorted({row["category"] for row in rows} - set(_CATEGORIES))
    if unknown:
        raise ModelError(f"{path}: unknown tag category {unknown[0]!r}; known: {', '.join(_CATEGORIES)}")
    return [Label(row["name"], _CATEGORIES[row["category"]]) for row in rows]
