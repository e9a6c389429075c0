"""CLIP's image embeddings, computed once for all heads that stand on the same CLIP; and what those heads share.

The embedding is the one after the projection (512 numbers for ViT-B/32, 768 for ViT-L/14), not the vision tower's
pooled output. Heads are small and run on the CPU in float32, whatever device CLIP is on. A head is a formula on
embeddings of length 1 and the shapes of its tensors; see aes_b32.py for one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from captioning.model_files import ModelFilesSettings, locate, locate_file
from captioning.plugin import Device, Features, Identity, ModelError, Pixels, Row
from captioning.preparers import CentreCrop, CropRounding
from captioning.scorers.base import score_rows
from captioning.torch_models import (
    TRANSFORMERS_FILES,
    Processor,
    Shapes,
    Tensors,
    import_torch,
    quiet_transformers,
    read_tensors,
    to_device,
    torch_device,
)
from sharding.schema import SCORES

_VERSIONS: dict[CropRounding, str] = {
    "transformers": "clip-centre-crop/1",
    "openai": "clip-centre-crop-openai/1",
}
_BICUBIC = 3
"""Pillow's number."""


class ClipHeadSettings(ModelFilesSettings):
    """A head and the CLIP it was trained on; `revision` is the head's."""

    clip: str
    """Folder of a transformers CLIP model, or a hub id."""
    head: str
    """The head's .pth or .safetensors file, or OWNER/NAME/FILE on the hub."""
    clip_revision: str = "main"
    """Branch, tag or commit of the CLIP model on the hub."""
    clip_crop: CropRounding = "transformers"
    """Whose centre crop: transformers', or that of OpenAI's own package, which differs by a pixel for some sizes."""


@dataclass(frozen=True)
class ClipSpec:
    """A CLIP's vision tower in one revision behind one pre-processing; equal wherever its files lie."""

    revision: str
    crop: CropRounding
    folder: Path = field(compare=False)

    @property
    def num_features(self) -> int:
        """Length of an embedding, from config.json. Raises ModelError."""
        path = self.folder / "config.json"
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["projection_dim"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: no projection_dim to be read; not a transformers CLIP model") from error

    def load(self, *, device: Device) -> "Clip":
        """Load the vision tower and its projection. Raises ModelError."""
        target = torch_device(device)
        try:
            with quiet_transformers() as transformers:  # the text tower's weights are unused on purpose
                model = transformers.CLIPVisionModelWithProjection.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}: not a transformers CLIP model ({error})") from error
        processor = Processor.read(self.folder)
        return Clip(model.to(target).float().eval(), processor=processor, crop=self.crop, device=target)


class Clip:
    """A loaded vision tower with its projection."""

    batch_size = None

    def __init__(self, model: Any, *, processor: Processor, crop: CropRounding, device: str) -> None:
        values = processor.values
        if not values.get("do_center_crop", True) or values.get("resample", _BICUBIC) != _BICUBIC:
            raise ModelError(f"{processor.path}: expected a bicubic resize and a centre crop, as CLIP has them")
        (shortest,), (side,) = processor.sides("size", "shortest_edge"), processor.sides("crop_size", "height")
        self.preparer = CentreCrop(shortest, side, crop)
        self._processor = processor
        self._model = model
        self._device = device

    def embed(self, batch: Pixels) -> Features:
        """Return image embeddings (N, num_features), not normalised; batch: (N, side, side, 3) uint8 RGB."""
        torch = import_torch()
        with torch.inference_mode():
            pixels = to_device(self._processor.normalise(batch), self._device)
            embeds: Features = self._model(pixel_values=pixels).image_embeds.float().cpu().numpy()
        return embeds


Formula = Callable[[Features, Tensors], Features]
"""Embeddings of length 1 (N, num_features) and the head's tensors → scores (N,) or (N, 1)."""


@dataclass(frozen=True)
class ClipHead:
    """A loaded head."""

    backbone: ClipSpec
    tensors: Tensors
    formula: Formula

    def score(self, features: Features) -> list[Row]:
        """Return schema.SCORES rows; features: (N, num_features), normalised here row by row."""
        return score_rows(self.formula(unit_length(features), self.tensors).reshape(len(features)))


def identify_head(settings: ClipHeadSettings, **others: Any) -> Identity:
    """Find the files of CLIP and of the head; others: what else changes the scores. Raises ModelError."""
    (_, clip_revision), (_, head_revision) = _find(settings)
    return Identity(
        model=f"{settings.head} on {settings.clip}",
        revision=f"{head_revision} on {clip_revision}",
        preprocessing=_VERSIONS[settings.clip_crop],
        schema=SCORES,
        licence=settings.licence,
        settings=others,
    )


def load_head(settings: ClipHeadSettings, *shapes: Shapes, num_features: int, formula: Formula) -> ClipHead:
    """Load the head alone; `shapes` and the error are those of `read_tensors`. Raises ModelError."""
    (folder, clip_revision), (path, _) = _find(settings)
    spec = ClipSpec(clip_revision, settings.clip_crop, folder)
    if spec.num_features != num_features:
        raise ModelError(f"{folder}: projection_dim is {spec.num_features}, the head takes {num_features}")
    return ClipHead(spec, read_tensors(path, *shapes), formula)


def _find(settings: ClipHeadSettings) -> tuple[tuple[Path, str], tuple[Path, str]]:
    clip = locate(settings.clip, revision=settings.clip_revision, patterns=TRANSFORMERS_FILES, key="clip")
    return clip, locate_file(settings.head, revision=settings.revision, key="head")


# --- formulas ---


def unit_length(features: Features) -> Features:
    """Divide each row by its own length; a row of zeros stays. A norm over the batch would mix the rows."""
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    return np.asarray(features / np.where(lengths == 0, 1, lengths), dtype=np.float32)


def dense(inputs: Features, tensors: Tensors, name: str) -> Features:
    """Apply a torch Linear, `name`.weight (out, in) and `name`.bias (out,)."""
    return np.asarray(inputs @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])


def relu(inputs: Features) -> Features:
    return np.maximum(inputs, 0)


def sigmoid(inputs: Features) -> Features:
    """Return 1 / (1 + e^-x) without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * inputs)))


def linear_shapes(name: str, num_inputs: int, num_outputs: int) -> Shapes:
    """Return the shapes of a torch Linear's tensors."""
    return {f"{name}.weight": (num_outputs, num_inputs), f"{name}.bias": (num_outputs,)}
