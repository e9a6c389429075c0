"""WD taggers v1.4 to v3 (SmilingWolf): `model.onnx` and `selected_tags.csv`.

moat, convnext, convnextv2, vit, swinv2, eva02, vit-large: names of inputs and outputs, side and batch size come from
the file. All want BGR, 0 … 255 as float32, NHWC, no mean and no standard deviation, in a square; anything else gives
plausible but wrong tags without an error. The output is already a probability.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from captioning.model_files import locate
from captioning.onnx_session import MODEL_FILES, open_session
from captioning.plugin import Device, Identity, Preparer
from captioning.taggers.base import TaggerSettings, label_table, rating_columns
from captioning.taggers.labels import read_selected_tags
from captioning.taggers.onnx_tagger import OnnxTagger
from captioning.taggers.square import Geometry, OpaquePreparer, SquarePreparer
from sharding.schema import TAGGER

TAGS_FILE = "selected_tags.csv"


class Settings(TaggerSettings):
    """A tagger of the WD family."""

    model: str
    """Folder with model.onnx and selected_tags.csv, or a hub id."""
    preprocessing: Geometry = "demo"
    """How a picture becomes a square: demo (the model's author), kohya, kohya_087 (the seed), tag_editor."""
    alpha: Literal["white", "dropped"] = "white"
    """white: transparent pixels lie on white. dropped: their hidden colours show, and neither EXIF rotation nor colour
    profile is applied, as in kohya v0.8.7 and before (the seed)."""


def identify(settings: Settings) -> Identity:
    """Find the model's files and read its labels. Raises ModelError."""
    folder, revision = _find(settings)
    dropped = " alpha dropped" if settings.alpha == "dropped" else ""
    return Identity(
        model=settings.model,
        revision=revision,
        preprocessing=f"wd/{settings.preprocessing}/1{dropped}",
        schema=TAGGER,
        licence=settings.licence,
        settings={"floor": settings.floor},
        labels=label_table(read_selected_tags(folder / TAGS_FILE)),
    )


def load(settings: Settings, *, device: Device) -> OnnxTagger:
    """Load the model. Raises ModelError (MissingExtraError without onnxruntime)."""
    folder, _ = _find(settings)
    labels = read_selected_tags(folder / TAGS_FILE)
    session = open_session(folder / MODEL_FILES[0], device)
    square = SquarePreparer(session.side, settings.preprocessing)
    preparer: Preparer = OpaquePreparer(square) if settings.alpha == "dropped" else square
    return OnnxTagger(
        session,
        preparer=preparer,
        to_input=lambda batch: batch.astype(np.float32),
        labels=labels,
        rating_ids=rating_columns(labels),
        floor=settings.floor,
        label_file=folder / TAGS_FILE,
    )


def _find(settings: Settings) -> tuple[Path, str]:
    return locate(settings.model, revision=settings.revision, patterns=[*MODEL_FILES, TAGS_FILE])
