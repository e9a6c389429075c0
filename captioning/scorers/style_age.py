"""anime_style_ages (deepghs): the decade that a picture's style looks like, as its first year (1970s- gives 1970).

The most probable class. It is about style, not about when a picture was made or posted: it never becomes a date.
"""

import re

import numpy as np
import numpy.typing as npt

from captioning.model_files import SubfolderSettings
from captioning.plugin import Device, Identity, ModelError
from captioning.scorers.classes import Classifier, Probs, find, open_classifier, read_class_names
from sharding.schema import SCORES

_SIDE = 384


class Settings(SubfolderSettings):
    """The classifier."""


def identify(settings: Settings) -> Identity:
    """Find the model's files. Raises ModelError."""
    _, revision = find(settings)
    return Identity(
        model=f"{settings.model} {settings.subfolder}".strip(),
        revision=revision,
        preprocessing="squash-half/1",
        schema=SCORES,
        licence=settings.licence,
    )


def load(settings: Settings, *, device: Device) -> Classifier:
    """Load the model and its labels. Raises ModelError."""
    folder, _ = find(settings)
    names = read_class_names(folder)
    matches = [re.match(r"\d{4}", name) for name in names]
    if not names or not all(matches):
        raise ModelError(f"{folder}: labels are {', '.join(names)}, expected years such as 1970s- or 2010s")
    years = np.array([int(match[0]) for match in matches if match])

    def formula(probs: Probs) -> npt.NDArray[np.float64]:
        # No year for NaN: it becomes status not_finite.
        return np.where(np.isfinite(probs).all(axis=1), years[probs.argmax(axis=1)], np.nan)

    return open_classifier(folder, formula, device=device, side=_SIDE, num_labels=len(names))
