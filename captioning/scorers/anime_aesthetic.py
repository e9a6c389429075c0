"""anime_aesthetic (deepghs): seven classes from worst to masterpiece, made one number.

The mean of the classes' ranks (worst 0 … masterpiece 6) weighted by probability, and where that stands among the
samples that come with the model: 0 … 1, the share of pictures that are worse. Ranks go by name, because the order of
labels in `meta.json` is the file's own.
"""

import csv
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from captioning.model_files import SubfolderSettings
from captioning.plugin import Device, Identity, ModelError
from captioning.scorers.classes import Classifier, Probs, find, open_classifier, read_class_names
from sharding.schema import SCORES

RANKS = ("worst", "low", "normal", "good", "great", "best", "masterpiece")
_SAMPLES_CSV, _SAMPLES_NPZ = "samples.csv", "samples.npz"
_SIDE = 448
_TOP = float(len(RANKS) - 1)
Samples = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


class Settings(SubfolderSettings):
    """The classifier."""

    score: Literal["percentile", "mean", "dataset_helpers"] = "percentile"
    """percentile: share of samples below, 0 … 1. mean: weighted rank, 0 … 6. dataset_helpers: 1 - percentile of the
    mean over labels in the file's order, interpolated as that tool does."""


def identify(settings: Settings) -> Identity:
    """Find the model's files. Raises ModelError."""
    _, revision = find(settings, _SAMPLES_CSV, _SAMPLES_NPZ)
    return Identity(
        model=f"{settings.model} {settings.subfolder}".strip(),
        revision=revision,
        preprocessing="squash-half/1",
        schema=SCORES,
        licence=settings.licence,
        settings={"score": settings.score},
    )


def load(settings: Settings, *, device: Device) -> Classifier:
    """Load the model, its labels and samples. Raises ModelError."""
    folder, _ = find(settings, _SAMPLES_CSV, _SAMPLES_NPZ)
    names = read_class_names(folder)
    if sorted(names) != sorted(RANKS):
        raise ModelError(f"{folder}: labels are {', '.join(names)}, expected {', '.join(RANKS)}")
    in_order = settings.score == "dataset_helpers"
    ranks = np.array([place if in_order else RANKS.index(name) for place, name in enumerate(names)], dtype=np.float64)
    samples = None if settings.score == "mean" else read_samples(folder)

    def formula(probs: Probs) -> npt.NDArray[np.float64]:
        means = probs.astype(np.float64) @ ranks
        if samples is None:
            return means
        if in_order:
            return np.array([1 - _next_segment(mean, *samples) for mean in means])
        return np.interp(means, *samples)

    return open_classifier(folder, formula, device=device, side=_SIDE, num_labels=len(names))


def read_samples(folder: Path) -> Samples:
    """Return (means ascending, share of samples below) of samples.csv (column `score`) or samples.npz (two rows).

    Raises ModelError.
    """
    path = folder / _SAMPLES_CSV
    if not path.is_file():
        return _read_npz(folder / _SAMPLES_NPZ)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            scores = np.sort([float(row["score"]) for row in csv.DictReader(stream)])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: no column `score` of numbers ({error!r})") from error
    if not len(scores):
        raise ModelError(f"{path}: holds no samples")
    shares = np.arange(len(scores)) / len(scores)
    return np.concatenate([[0.0], scores, [_TOP]]), np.concatenate([[0.0], shares, [1.0]])


def _read_npz(path: Path) -> Samples:
    try:
        with np.load(path, allow_pickle=False) as file:
            means, shares = file["arr_0"].astype(np.float64)
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: neither {_SAMPLES_CSV} nor {_SAMPLES_NPZ}; or set score = 'mean'") from None
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ModelError(f"{path}: no two rows `arr_0` to be read ({error!r})") from error
    if (np.diff(means) < 0).any() or (np.diff(shares) < 0).any():
        raise ModelError(f"{path}: expected ascending means and shares")
    return means, shares


def _next_segment(mean: float, means: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]) -> float:
    """Interpolate on the segment after the one that holds `mean`, as dataset-helpers does."""
    place = int(np.searchsorted(means, np.clip(mean, 0, _TOP)))
    if place >= len(means) - 1:
        return float(shares[-1])
    width = means[place + 1] - means[place]
    if width == 0:
        return float(shares[place])
    slope = (shares[place + 1] - shares[place]) / width
    return float(np.clip((mean - means[place]) * slope + shares[place], 0, 1))
