"""LAION's aesthetic predictors on CLIP ViT-L/14 embeddings: the improved one (MLP) and the first one (linear).

Both are chains of linear layers without anything between them (the MLP's dropout is off when it scores), on the
embedding of length 1. Scores are about 1 … 10; `aesthetic_score` of the Stable Cascade filters is this scale. Which of
the two a file is, its tensors say.
"""

import re

from captioning.plugin import Device, Features, Identity
from captioning.scorers.clip import ClipHead, ClipHeadSettings, dense, identify_head, linear_shapes, load_head
from captioning.torch_models import Shapes, Tensors

NUM_FEATURES = 768
_LINEAR: Shapes = {"weight": (1, NUM_FEATURES), "bias": (1,)}
_MLP: Shapes = (
    linear_shapes("layers.0", NUM_FEATURES, 1024)
    | linear_shapes("layers.2", 1024, 128)
    | linear_shapes("layers.4", 128, 64)
    | linear_shapes("layers.6", 64, 16)
    | linear_shapes("layers.7", 16, 1)
)


class Settings(ClipHeadSettings):
    """One of the two predictors."""


def predictor(embeds: Features, tensors: Tensors) -> Features:
    """Return scores (N, 1) for embeddings of length 1."""
    if "weight" in tensors:
        return embeds @ tensors["weight"].T + tensors["bias"]
    layers = sorted({int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))})
    for layer in layers:
        embeds = dense(embeds, tensors, f"layers.{layer}")
    return embeds


def identify(settings: Settings) -> Identity:
    """Find the files of CLIP and of the head. Raises ModelError."""
    return identify_head(settings)


def load(settings: Settings, *, device: Device) -> ClipHead:
    """Load the head. Raises ModelError."""
    return load_head(settings, _MLP, _LINEAR, num_features=NUM_FEATURES, formula=predictor)
