"""LAION's NSFW head on CLIP ViT-L/14 embeddings: the probability that a picture is not safe for work, 0 … 1.

Each number of the embedding (length 1) minus a stored mean, by the root of a stored variance, then 768 → 64 → 512 →
256 → 1 with ReLU and a sigmoid. Tensor names are those of the torch conversion that NeMo Curator uses. Higher is less
safe: `nsfw_probability` of the Stable Cascade filters is this number.
"""

import numpy as np

from captioning.plugin import Device, Features, Identity
from captioning.scorers.clip import (
    ClipHead,
    ClipHeadSettings,
    dense,
    identify_head,
    linear_shapes,
    load_head,
    relu,
    sigmoid,
)
from captioning.torch_models import Shapes, Tensors

NUM_FEATURES = 768
_SHAPES: Shapes = (
    {"norm.mean": (NUM_FEATURES,), "norm.variance": (NUM_FEATURES,)}
    | linear_shapes("linear_1", NUM_FEATURES, 64)
    | linear_shapes("linear_2", 64, 512)
    | linear_shapes("linear_3", 512, 256)
    | linear_shapes("linear_4", 256, 1)
)


class Settings(ClipHeadSettings):
    """The head."""


def probability(embeds: Features, tensors: Tensors) -> Features:
    """Return probabilities (N, 1) for embeddings of length 1."""
    hidden: Features = np.asarray((embeds - tensors["norm.mean"]) / np.sqrt(tensors["norm.variance"]))
    for name in ("linear_1", "linear_2", "linear_3"):
        hidden = relu(dense(hidden, tensors, name))
    return sigmoid(dense(hidden, tensors, "linear_4"))


def identify(settings: Settings) -> Identity:
    """Find the files of CLIP and of the head. Raises ModelError."""
    return identify_head(settings)


def load(settings: Settings, *, device: Device) -> ClipHead:
    """Load the head. Raises ModelError."""
    return load_head(settings, _SHAPES, num_features=NUM_FEATURES, formula=probability)
