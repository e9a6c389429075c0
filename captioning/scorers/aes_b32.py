"""aes-B32-v0 (hakurei): a small head on CLIP image embeddings, a saturating 0 … 1 quality score.

CLIP's image_embeds (512 numbers after the projection), each row divided by its own length, then 512 → 256 → 128 → 1
with ReLU, and a sigmoid inside the network. A norm over the batch, the 768 numbers before the projection, or a second
sigmoid all give plausible, wrong scores. CLIP crops the centre; the published thresholds hold for that only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.model_files import ModelFilesSettings, locate, locate_file
from captioning.plugin import Device, Identity, ModelError, Pixels, Row
from captioning.scorers.base import score_rows
from captioning.torch_models import TRANSFORMERS_FILES, Processor, import_torch, quiet_transformers, torch_device
from sharding.schema import SCORES

_VERSION = "clip-centre-crop/1"
_HEAD_SHAPES = {
    "fc1.weight": (256, 512), "fc1.bias": (256,),
    "fc2.weight": (128, 256), "fc2.bias": (128,),
    "fc3.weight": (1, 128), "fc3.bias": (1,),
}  # fmt: skip


class Settings(ModelFilesSettings):
    """The quality head and the CLIP it was trained on; `revision` is the head's."""

    clip: str
    """Folder of a transformers CLIP model with a 512-d projection, or a hub id."""
    head: str
    """The head's .pth file, or OWNER/NAME/FILE on the hub."""
    clip_revision: str = "main"
    """Branch, tag or commit of the CLIP model on the hub."""


@dataclass(frozen=True)
class CentreCropPreparer:
    """Resize the shorter side to `shortest`, bicubic, then cut `crop` × `crop` from the centre. Source: CLIP."""

    shortest: int
    crop: int

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (crop, crop, 3) uint8 RGB."""
        width, height = image.size
        if width <= height:
            size = (self.shortest, int(self.shortest * height / width))
        else:
            size = (int(self.shortest * width / height), self.shortest)
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        # Cutting and scaling in one call would sample other pixels; the resized picture is small.
        resized = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + self.crop, top + self.crop)))

    @property
    def min_side(self) -> int:
        return self.shortest


class AesB32:
    """CLIP's vision tower and the head, loaded."""

    batch_size = None

    def __init__(self, clip: Any, *, head: dict[str, Any], processor: Processor, device: str) -> None:
        (shortest,), (crop,) = processor.sides("size", "shortest_edge"), processor.sides("crop_size", "height")
        self.preparer = CentreCropPreparer(shortest, crop)
        self._processor = processor
        self._clip = clip
        self._head = {name: value.to(device) for name, value in head.items()}
        self._device = device

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.SCORES rows; batch: (N, crop, crop, 3) uint8 RGB."""
        torch = import_torch()
        pixels = torch.from_numpy(self._processor.normalise(batch))
        with torch.inference_mode():
            embeds = self._clip(pixel_values=pixels.to(self._device)).image_embeds.float()
            scores = apply_head(embeds, self._head)
        return score_rows(scores.cpu().tolist())


def apply_head(embeds: Any, head: dict[str, Any]) -> Any:
    """Return scores (N,) for CLIP image embeddings (N, 512); the sigmoid is the network's own, not to be repeated."""
    linear = import_torch().nn.functional.linear
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    hidden = linear(embeds, head["fc1.weight"], head["fc1.bias"]).relu()
    hidden = linear(hidden, head["fc2.weight"], head["fc2.bias"]).relu()
    return linear(hidden, head["fc3.weight"], head["fc3.bias"]).sigmoid().squeeze(-1)


def identify(settings: Settings) -> Identity:
    """Find the files of CLIP and of the head. Raises ModelError."""
    (_, clip_revision), (_, head_revision) = _find(settings)
    return Identity(
        model=f"{settings.head} on {settings.clip}",
        revision=f"{head_revision} on {clip_revision}",
        preprocessing=_VERSION,
        schema=SCORES,
        licence=settings.licence,
    )


def load(settings: Settings, *, device: Device) -> AesB32:
    """Load CLIP's vision tower and the head. Raises ModelError."""
    target = torch_device(device)
    (folder, _), (head_path, _) = _find(settings)
    head = read_head(head_path)
    try:
        with quiet_transformers() as transformers:  # the text tower's weights are unused on purpose
            clip = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a transformers CLIP model ({error})") from error
    if clip.config.projection_dim != _HEAD_SHAPES["fc1.weight"][1]:
        raise ModelError(f"{folder}: projection_dim is {clip.config.projection_dim}, the head takes 512")
    return AesB32(clip.to(target).float().eval(), head=head, processor=Processor.read(folder), device=target)


def read_head(path: Path) -> dict[str, Any]:
    """Read the head's six tensors from a .pth, without running code from it. Raises ModelError."""
    import pickle

    torch = import_torch()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{path}: not readable as plain weights ({str(error)[:200]})") from error
    shapes = {name: tuple(value.shape) for name, value in state.items()} if isinstance(state, dict) else {}
    if shapes != _HEAD_SHAPES:
        raise ModelError(f"{path}: expected the tensors {_HEAD_SHAPES}, found {shapes}")
    return {name: value.float() for name, value in state.items()}


def _find(settings: Settings) -> tuple[tuple[Path, str], tuple[Path, str]]:
    clip = locate(settings.clip, revision=settings.clip_revision, patterns=TRANSFORMERS_FILES, key="clip")
    return clip, locate_file(settings.head, revision=settings.revision, key="head")
