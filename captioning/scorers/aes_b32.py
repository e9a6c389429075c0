"""aes-B32-v0 (hakurei): a small head on CLIP ViT-B/32 embeddings, a saturating 0 … 1 quality score.

Each embedding divided by its own length, then 512 → 256 → 128 → 1 with ReLU, and a sigmoid inside the network. The
768 numbers before CLIP's projection, or a second sigmoid, give plausible, wrong scores. CLIP crops the centre; the
published thresholds hold for that only.
"""

from pydantic import Field

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
from captioning.torch_models import Tensors

_SHAPES = linear_shapes("fc1", 512, 256) | linear_shapes("fc2", 256, 128) | linear_shapes("fc3", 128, 1)


class Settings(ClipHeadSettings):
    """The quality head."""

    norm_over: int = Field(1, gt=0)
    """Embeddings per norm. 1: each row by its own, as the head was trained and the seed was scored. Another number
    gives what a norm over a batch of so many equally long embeddings gave in older tools: all scores move."""


def identify(settings: Settings) -> Identity:
    """Find the files of CLIP and of the head. Raises ModelError."""
    return identify_head(settings, norm_over=settings.norm_over)


def load(settings: Settings, *, device: Device) -> ClipHead:
    """Load the head. Raises ModelError."""
    scale = settings.norm_over**-0.5

    def formula(embeds: Features, tensors: Tensors) -> Features:
        hidden = relu(dense(embeds * scale, tensors, "fc1"))
        hidden = relu(dense(hidden, tensors, "fc2"))
        return sigmoid(dense(hidden, tensors, "fc3"))

    return load_head(settings, _SHAPES, num_features=512, formula=formula)
