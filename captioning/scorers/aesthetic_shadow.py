"""aesthetic-shadow and other two-label image classifiers of transformers: the probability of the label `hq`.

By label, never by position: pipelines sort labels by score. The picture is squashed to the processor's size, neither
cropped nor padded, with the processor's own mean and standard deviation; ViT's usual 0.5 shifts every score.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from captioning.plugin import (
    Device,
    Identity,
    ModelError,
    Pixels,
    Row,
    import_torch,
    locate,
    quiet_transformers,
    torch_device,
)
from captioning.scorers.base import normalise, read_processor, score_rows
from sharding.config import Config
from sharding.schema import SCORES

_PATTERNS = ("config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*.bin*")
_VERSION = "squash/1"


class AestheticShadowConfig(Config):
    """An image classifier with a label for good pictures."""

    kind: Literal["aesthetic_shadow"]
    """Selects this plug-in."""
    model: str
    """Folder of a transformers image classification model, or a hub id."""
    revision: str = "main"
    """Branch, tag or commit on the hub; the commit it stands for is stored with every part."""
    licence: str = ""
    """As its publisher states it; stored with every part."""
    label: str = "hq"
    """The label whose probability is the score."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the network; the softmax is always float32."""


@dataclass(frozen=True)
class SquashPreparer:
    """Resize to width × height without keeping the aspect ratio. resample: Pillow's number of the filter."""

    width: int
    height: int
    resample: int

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (height, width, 3) uint8 RGB."""
        return np.array(image.resize((self.width, self.height), Image.Resampling(self.resample)))

    @property
    def min_side(self) -> int:
        return max(self.width, self.height)


class AestheticShadow:
    """A loaded classifier."""

    batch_size = None

    def __init__(self, model: Any, *, processor: dict[str, Any], label_id: int, device: str) -> None:
        size = processor["size"]
        height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        self.preparer = SquashPreparer(width, height, processor.get("resample", Image.Resampling.BILINEAR))
        self._mean = np.array(processor["image_mean"], dtype=np.float32)
        self._std = np.array(processor["image_std"], dtype=np.float32)
        self._scale = float(processor.get("rescale_factor", 1 / 255))
        self._model = model
        self._label_id = label_id
        self._device = device

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.SCORES rows; batch: (N, height, width, 3) uint8 RGB."""
        torch = import_torch()
        pixels = torch.from_numpy(normalise(batch, mean=self._mean, std=self._std, scale=self._scale))
        with torch.inference_mode():
            logits = self._model(pixel_values=pixels.to(self._device, self._model.dtype)).logits
            scores = torch.softmax(logits.float(), dim=-1)[:, self._label_id]
        return score_rows(scores.cpu().tolist())


def identify(settings: AestheticShadowConfig) -> Identity:
    """Find the model's files. Raises ModelError."""
    _, revision = locate(settings.model, revision=settings.revision, patterns=_PATTERNS)
    return Identity(
        model=settings.model,
        revision=revision,
        preprocessing=_VERSION,
        schema=SCORES,
        licence=settings.licence,
        settings={"label": settings.label, "dtype": settings.dtype},
    )


def load(settings: AestheticShadowConfig, *, device: Device) -> AestheticShadow:
    """Load the model. Raises ModelError."""
    torch = import_torch()
    target = torch_device(device)
    folder, _ = locate(settings.model, revision=settings.revision, patterns=_PATTERNS)
    processor = _checked_processor(folder)
    try:
        with quiet_transformers() as transformers:
            model = transformers.AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a transformers image classification model ({error})") from error
    label_ids = [number for number, name in model.config.id2label.items() if name == settings.label]
    if len(label_ids) != 1:
        known = ", ".join(map(str, model.config.id2label.values()))
        raise ModelError(f"{folder}: no label {settings.label!r}; it has {known}")
    model = model.to(target, getattr(torch, settings.dtype)).eval()
    return AestheticShadow(model, processor=processor, label_id=int(label_ids[0]), device=target)


def _checked_processor(folder: Path) -> dict[str, Any]:
    processor = read_processor(folder)
    size = processor.get("size")
    if not isinstance(size, int) and not (isinstance(size, dict) and {"height", "width"} <= set(size)):
        raise ModelError(f"{folder}/preprocessor_config.json: size must give height and width, got {size!r}")
    if missing := [name for name in ("image_mean", "image_std") if name not in processor]:
        raise ModelError(f"{folder}/preprocessor_config.json: {', '.join(missing)} missing")
    return processor
