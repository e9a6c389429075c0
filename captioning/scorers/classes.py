"""What ONNX classifiers of deepghs share: `model.onnx`, `meta.json` with `labels`, a squashed picture, (x - 0.5) / 0.5.

N x 3 x side x side in RGB, bicubic; the output is one probability per label. Turning them into one number is each
scorer's own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioning.model_files import SubfolderSettings, locate
from captioning.onnx_session import MODEL_FILES, OnnxSession, open_session
from captioning.plugin import Device, ModelError, Pixels, Row
from captioning.preparers import Squash
from captioning.scorers.base import score_rows

LABELS_FILE = "meta.json"
Probs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier and its formula: probabilities (N, labels) → scores (N,)."""

    session: OnnxSession
    formula: Callable[[Probs], npt.NDArray[np.floating]]

    @property
    def preparer(self) -> Squash:
        return Squash(self.session.side, self.session.side, Image.Resampling.BICUBIC)

    @property
    def batch_size(self) -> int | None:
        return self.session.batch_size

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.SCORES rows; batch: (N, side, side, 3) uint8 RGB."""
        scaled = (batch.astype(np.float32) / 255 - 0.5) / 0.5
        return score_rows(self.formula(self.session.run(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))))


def find(settings: SubfolderSettings, *others: str) -> tuple[Path, str]:
    """Return (folder, exact revision) of the model's files; others: patterns beside its own. Raises ModelError."""
    patterns = [*MODEL_FILES, LABELS_FILE, *others]
    return locate(settings.model, revision=settings.revision, patterns=patterns, subfolder=settings.subfolder)


def open_classifier(
    folder: Path, formula: Callable[[Probs], npt.NDArray[np.floating]], *, device: Device, side: int, num_labels: int
) -> Classifier:
    """Open the model; side: pixels, for a file that leaves them open. Raises ModelError."""
    session = open_session(folder / MODEL_FILES[0], device, layout="nchw", side=side)
    if session.num_values not in (None, num_labels):
        raise ModelError(f"{folder}: the model gives {session.num_values} values, {LABELS_FILE} names {num_labels}")
    return Classifier(session, formula)


def read_class_names(folder: Path) -> list[str]:
    """Read the labels of meta.json, in the order of the outputs. Raises ModelError."""
    path = folder / LABELS_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; it names the outputs of the model beside it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no list `labels` to be read ({error!r})") from error
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not all(isinstance(it, str) for it in labels):
        raise ModelError(f"{path}: labels: expected a list of names, got {labels!r}")
    return list(labels)
