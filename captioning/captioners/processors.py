"""The processor of a transformers captioner: how it is read, and which of its resizing the decode workers can do."""

import importlib.util
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.plugin import MissingExtraError, Pixels, Preparer
from captioning.preparers import Squash


@dataclass(frozen=True)
class Fit:
    """Shrink to at most `max_pixels` pixels, bicubic, aspect ratio kept."""

    max_pixels: int

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (H, W, 3) uint8 RGB, in the picture's own shape."""
        scale = math.sqrt(self.max_pixels / (image.width * image.height))
        if scale < 1:
            size = (max(int(image.width * scale), 1), max(int(image.height * scale), 1))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(image)

    @property
    def min_side(self) -> int:
        return math.isqrt(self.max_pixels)


def read_processor(transformers: Any, folder: Path) -> Any:
    """Return the processor, its pictures resized by Pillow; one that takes videos, too, needs torchvision for those.

    Raises MissingExtraError, and what transformers raises.
    """
    processors, images = transformers.AutoProcessor, transformers.AutoImageProcessor
    try:
        return processors.from_pretrained(folder, local_files_only=True, backend="pil")
    except ImportError as error:
        if "backend" not in str(error) and "torchvision" not in str(error).lower():
            raise
        if importlib.util.find_spec("torchvision") is None:
            raise MissingExtraError("torchvision", extras="caption,cpu,video") from error
    processor = processors.from_pretrained(folder, local_files_only=True)
    with suppress(ImportError):  # some models have no other way of resizing pictures than torchvision's
        processor.image_processor = images.from_pretrained(folder, local_files_only=True, backend="pil")
    return processor


def preparer_of(processor: Any, max_pixels: int) -> Preparer:
    """Return the processor's own resizing where it is a plain squash: so it is done by the workers, on every pixel."""
    image = processor.image_processor
    size = getattr(image, "size", None) or {}
    sides = {name: value for name, value in dict(size).items() if value is not None}
    is_cropped = bool(getattr(image, "do_center_crop", False)) or bool(getattr(image, "do_pad", False))
    if set(sides) != {"height", "width"} or is_cropped or not getattr(image, "do_resize", False):
        return Fit(max_pixels)
    return Squash(int(sides["width"]), int(sides["height"]), int(image.resample))
