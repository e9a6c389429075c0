"""aesthetic-shadow and other two-label image classifiers of transformers: the probability of the label `hq`.

By label, never by position: pipelines sort labels by score. The picture is squashed to the processor's size, neither
cropped nor padded, with the processor's own mean and standard deviation; ViT's usual 0.5 shifts every score.
"""

from typing import Any, Literal

from PIL import Image

from captioning.model_files import ModelFilesSettings, locate
from captioning.plugin import Device, Identity, ModelError, Pixels, Row
from captioning.preparers import Squash
from captioning.scorers.base import score_rows
from captioning.torch_models import (
    TRANSFORMERS_FILES,
    Processor,
    import_torch,
    quiet_transformers,
    to_device,
    torch_device,
)
from sharding.schema import SCORES

_VERSION = "squash/1"


class Settings(ModelFilesSettings):
    """An image classifier with a label for good pictures."""

    model: str
    """Folder of a transformers image classification model, or a hub id."""
    label: str = "hq"
    """The label whose probability is the score."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the network; the softmax is always float32."""


class AestheticShadow:
    """A loaded classifier."""

    batch_size = None

    def __init__(self, model: Any, *, processor: Processor, label_id: int, device: str) -> None:
        height, width = processor.sides("size", "height", "width")
        self.preparer = Squash(width, height, processor.values.get("resample", Image.Resampling.BILINEAR))
        self._processor = processor
        self._model = model
        self._label_id = label_id
        self._device = device

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.SCORES rows; batch: (N, height, width, 3) uint8 RGB."""
        torch = import_torch()
        with torch.inference_mode():
            pixels = to_device(self._processor.normalise(batch), self._device).to(self._model.dtype)
            logits = self._model(pixel_values=pixels).logits
            scores = torch.softmax(logits.float(), dim=-1)[:, self._label_id]
        return score_rows(scores.cpu().tolist())


def identify(settings: Settings) -> Identity:
    """Find the model's files. Raises ModelError."""
    _, revision = locate(settings.model, revision=settings.revision, patterns=TRANSFORMERS_FILES)
    return Identity(
        model=settings.model,
        revision=revision,
        preprocessing=_VERSION,
        schema=SCORES,
        licence=settings.licence,
        settings={"label": settings.label, "dtype": settings.dtype},
    )


def load(settings: Settings, *, device: Device) -> AestheticShadow:
    """Load the model. Raises ModelError."""
    torch = import_torch()
    target = torch_device(device)
    folder, _ = locate(settings.model, revision=settings.revision, patterns=TRANSFORMERS_FILES)
    processor = Processor.read(folder)
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
