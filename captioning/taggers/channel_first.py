"""Channel-first ONNX taggers: PixAI, the deepghs and animetimm exports, and models with a `tag_mapping.json`.

N x 3 x side x side float32, each family with its own resizing, order of colours and numbers. What one of them gives
for another's pixels looks like tags and is wrong, so `preprocessing` has no default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioning.model_files import SubfolderSettings, locate
from captioning.onnx_session import open_session
from captioning.plugin import Device, Identity, ModelError, Pixels, Preparer
from captioning.preparers import Squash
from captioning.stages import Stages, read_stages
from captioning.taggers.base import Label, TaggerSettings, label_table, rating_columns
from captioning.taggers.labels import read_selected_tags, read_tag_mapping
from captioning.taggers.onnx_tagger import OnnxTagger
from captioning.taggers.square import SquarePreparer
from sharding.schema import TAGGER

STAGES_FILE = "preprocess.json"
_SIDE = 448
_HALVES = (0.5, 0.5, 0.5)


class Settings(TaggerSettings, SubfolderSettings):
    """A channel-first tagger."""

    preprocessing: Literal["pixai", "tag_mapping", "preprocess.json"]
    """pixai: squashed, bilinear, RGB, (x - 0.5) / 0.5. tag_mapping: white square, bicubic, BGR, (x - 0.5) / 0.5.
    preprocess.json: the stages in that file beside the model, RGB."""
    labels: str = "selected_tags.csv"
    """File that names the outputs: a .csv as WD's, or a .json as tag_mapping.json."""
    model_file: str = "model.onnx"
    """Name of the model's file."""
    output: str = ""
    """Name of the output; empty: the only one, or `prediction` or `output`."""
    activation: Literal["none", "sigmoid"] = "none"
    """sigmoid for a model whose output is logits, as that of models with a tag mapping."""


@dataclass(frozen=True)
class _Normalise:
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, batch: Pixels) -> npt.NDArray[np.float32]:
        """Return (N, 3, H, W) = (x / 255 - mean) / std."""
        scaled = batch.astype(np.float32) / 255
        mean, std = (np.array(values, dtype=np.float32) for values in (self.mean, self.std))
        return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))


def identify(settings: Settings) -> Identity:
    """Find the model's files and read its labels. Raises ModelError."""
    folder, revision = _find(settings)
    return Identity(
        model=f"{settings.model} {settings.subfolder}".strip(),
        revision=revision,
        preprocessing=f"channel_first/{settings.preprocessing}/1",
        schema=TAGGER,
        licence=settings.licence,
        settings={
            "floor": settings.floor,
            "output": settings.output,
            "activation": settings.activation,
            "files": [settings.model_file, settings.labels],
        },
        labels=label_table(_labels(folder / settings.labels)),
    )


def load(settings: Settings, *, device: Device) -> OnnxTagger:
    """Load the model. Raises ModelError (MissingExtraError without onnxruntime)."""
    folder, _ = _find(settings)
    labels = _labels(folder / settings.labels)
    stages = read_stages(folder / STAGES_FILE) if settings.preprocessing == STAGES_FILE else None
    side = _SIDE if stages is None else _side(stages)
    session = open_session(folder / settings.model_file, device, layout="nchw", side=side, output=settings.output)
    if stages is not None and session.side != side:
        raise ModelError(f"{folder}: {STAGES_FILE} gives {side} pixels, {settings.model_file} takes {session.side}")
    preparer: Preparer
    if stages is not None:
        preparer = stages
    elif settings.preprocessing == "pixai":
        preparer = Squash(session.side, session.side, Image.Resampling.BILINEAR)
    else:
        preparer = SquarePreparer(session.side)
    return OnnxTagger(
        session,
        preparer=preparer,
        to_input=_Normalise(_HALVES, _HALVES) if stages is None else _Normalise(stages.mean, stages.std),
        labels=labels,
        rating_ids=rating_columns(labels),
        floor=settings.floor,
        is_logits=settings.activation == "sigmoid",
        label_file=folder / settings.labels,
    )


def _side(stages: Stages) -> int:
    """Return the side of what comes out, which must be a square for these models."""
    height, width, _ = stages.prepare(Image.new("RGB", (64, 48))).shape
    if height != width:
        raise ModelError(f"{STAGES_FILE}: gives {width}x{height} pixels, expected a square")
    return int(height)


def _labels(path: Path) -> list[Label]:
    return read_tag_mapping(path) if path.suffix == ".json" else read_selected_tags(path)


def _find(settings: Settings) -> tuple[Path, str]:
    patterns = [settings.model_file, f"{settings.model_file}?data", settings.labels, STAGES_FILE]
    return locate(settings.model, revision=settings.revision, patterns=patterns, subfolder=settings.subfolder)
