"""waifu-scorer v3 (Eugeoter) and heads of its form: an MLP with batch normalisation on CLIP ViT-L/14 embeddings.

768 → 2048 → 512 → 256 → 128 → 32 → 1, each of the first four linear layers followed by ReLU and then batch
normalisation with its stored statistics. The network speaks from 0 to 10; stored is a tenth of it, 0 … 1.
"""

import numpy as np

from captioning.plugin import Device, Features, Identity
from captioning.scorers.clip import ClipHead, ClipHeadSettings, dense, identify_head, linear_shapes, load_head, relu
from captioning.torch_models import Shapes, Tensors

NUM_FEATURES = 768
_WIDTHS = (NUM_FEATURES, 2048, 512, 256, 128)
_EPSILON = 1e-5
"""Of torch's BatchNorm1d."""


def _shapes() -> Shapes:
    shapes = linear_shapes("layers.16", 128, 32) | linear_shapes("layers.18", 32, 1)
    for number in range(4):
        width = _WIDTHS[number + 1]
        shapes |= linear_shapes(f"layers.{4 * number}", _WIDTHS[number], width)
        shapes |= {
            f"layers.{4 * number + 2}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")
        }
    return shapes


class Settings(ClipHeadSettings):
    """The head."""


def scorer(embeds: Features, tensors: Tensors) -> Features:
    """Return scores (N, 1), 0 … 1, for embeddings of length 1."""
    hidden = embeds
    for number in range(4):
        hidden = relu(dense(hidden, tensors, f"layers.{4 * number}"))
        norm = f"layers.{4 * number + 2}"
        scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + _EPSILON)
        hidden = (hidden - tensors[f"{norm}.running_mean"]) * scale + tensors[f"{norm}.bias"]
    hidden = relu(dense(hidden, tensors, "layers.16"))
    return np.asarray(np.clip(dense(hidden, tensors, "layers.18"), 0, 10) / 10, dtype=np.float32)


def identify(settings: Settings) -> Identity:
    """Find the files of CLIP and of the head. Raises ModelError."""
    return identify_head(settings)


def load(settings: Settings, *, device: Device) -> ClipHead:
    """Load the head. Raises ModelError."""
    return load_head(settings, _shapes(), num_features=NUM_FEATURES, formula=scorer)
