"""DeepDanbooru as an ONNX model: `model.onnx` (N x 512 x 512 x 3, RGB, 0 … 1) and `tags.txt`.

Its ratings are safe, questionable and explicit; safe is stored as `general`, and `sensitive`, which it does not know,
as 0. Categories come from `tags-character.txt` beside tags.txt, if it is there; else every tag is general. Outputs are
probabilities.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from captioning.model_files import locate
from captioning.onnx_session import MODEL_FILES, open_session
from captioning.plugin import Device, Identity, ModelError, Pixels
from captioning.taggers.base import Label, TaggerSettings, label_table
from captioning.taggers.labels import read_lines
from captioning.taggers.onnx_tagger import OnnxTagger
from captioning.taggers.resampling import area_mean, to_uint8
from sharding.schema import RATINGS, TAGGER

TAGS_FILE = "tags.txt"
CHARACTERS_FILE = "tags-character.txt"
_RATING_PREFIX = "rating:"
_RATING_NAMES = {"safe": "general"}
"""Old name → ours."""


class Settings(TaggerSettings):
    """A DeepDanbooru model."""

    model: str
    """Folder with model.onnx and tags.txt, or a hub id."""
    preprocessing: Literal["deepdanbooru", "imgutils"] = "deepdanbooru"
    """deepdanbooru: shrunk by area, edge pixels repeated around it, as its own program. imgutils: bicubic, on black."""


@dataclass(frozen=True)
class FitPreparer:
    """Resize so that the longer side is `side`, and fill the square around the picture."""

    side: int
    is_original: bool

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (side, side, 3) uint8 RGB."""
        return self._by_area(image) if self.is_original else self._on_black(image)

    @property
    def min_side(self) -> int:
        return self.side

    def _by_area(self, image: Image.Image) -> Pixels:
        """Shrink by area; centre to half a pixel, so that an odd rest averages two pixels; repeat the edges."""
        scale = np.float32(self.side) / np.float32(max(image.size))
        width, height = (max(int(np.rint(scale * np.float32(side))), 1) for side in image.size)
        first, second = ((1, width), (0, height)) if image.width > image.height else ((0, height), (1, width))
        shrunk = area_mean(np.asarray(image), first[1], axis=first[0])
        shrunk = area_mean(shrunk, second[1], axis=second[0])
        for axis, size in ((0, height), (1, width)):
            rest = self.side - size
            places = np.arange(self.side) - rest / 2
            low, high = (np.clip(edge(places).astype(np.int64), 0, size - 1) for edge in (np.floor, np.ceil))
            shrunk = (np.take(shrunk, low, axis=axis) + np.take(shrunk, high, axis=axis)) / 2
        return to_uint8(shrunk)

    def _on_black(self, image: Image.Image) -> Pixels:
        scale = self.side / max(image.size)
        width, height = (max(int(side * scale), 1) for side in image.size)
        square = Image.new("RGB", (self.side, self.side))
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, ((self.side - width) // 2, (self.side - height) // 2))
        return np.array(square)


def identify(settings: Settings) -> Identity:
    """Find the model's files and read its labels. Raises ModelError."""
    folder, revision = _find(settings)
    return Identity(
        model=settings.model,
        revision=revision,
        preprocessing=f"deepdanbooru/{settings.preprocessing}/1",
        schema=TAGGER,
        licence=settings.licence,
        settings={"floor": settings.floor},
        labels=label_table(read_labels(folder)),
    )


def load(settings: Settings, *, device: Device) -> OnnxTagger:
    """Load the model. Raises ModelError (MissingExtraError without onnxruntime)."""
    folder, _ = _find(settings)
    labels = read_labels(folder)
    session = open_session(folder / MODEL_FILES[0], device, side=None)
    ratings = {label.name: number for number, label in enumerate(labels) if label.category == "rating"}
    return OnnxTagger(
        session,
        preparer=FitPreparer(session.side, settings.preprocessing == "deepdanbooru"),
        to_input=lambda batch: batch.astype(np.float32) / np.float32(255),
        labels=labels,
        rating_ids=[ratings.get(name) for name in RATINGS] if ratings else [],
        floor=settings.floor,
        label_file=folder / TAGS_FILE,
    )


def read_labels(folder: Path) -> list[Label]:
    """Read tags.txt, and tags-character.txt if it is there. Raises ModelError."""
    names = read_lines(folder / TAGS_FILE)
    has_characters = (folder / CHARACTERS_FILE).is_file()
    characters = set(read_lines(folder / CHARACTERS_FILE)) if has_characters else set()
    return [_label(name, characters, folder) for name in names]


def _label(name: str, characters: set[str], folder: Path) -> Label:
    if not name.startswith(_RATING_PREFIX):
        return Label(name, "character" if name in characters else "general")
    rating = name.removeprefix(_RATING_PREFIX)
    rating = _RATING_NAMES.get(rating, rating)
    if rating not in RATINGS:
        raise ModelError(f"{folder / TAGS_FILE}: unknown rating {name!r}")
    return Label(rating, "rating")


def _find(settings: Settings) -> tuple[Path, str]:
    return locate(settings.model, revision=settings.revision, patterns=[*MODEL_FILES, TAGS_FILE, CHARACTERS_FILE])
