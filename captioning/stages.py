"""`preprocess.json` of the deepghs and animetimm models: the list of stages a picture goes through, done with Pillow.

Known are convert_rgb, pad_to_size, resize, center_crop, to_tensor, maybe_to_tensor and normalize; another one is an
error, never left out. Source: imgutils and torchvision, whose rounding is kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from captioning.plugin import ModelError, Pixels
from captioning.preparers import middle

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_NO_PIXELS = ("convert_rgb", "to_tensor", "maybe_to_tensor")
"""Already true of what a preparer gets, or done on batches."""


@dataclass(frozen=True)
class Stage:
    """One change of a picture. size: height and width, or only the shorter side; colour: of the padding."""

    kind: str
    size: tuple[int, ...]
    resample: int = Image.Resampling.BILINEAR
    colour: tuple[int, ...] = (255, 255, 255)

    def apply(self, image: Image.Image) -> Image.Image:
        if self.kind == "center_crop":
            height, width = self.size * 2 if len(self.size) == 1 else self.size
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            return image.crop((left, top, left + width, top + height))
        if self.kind == "pad_to_size":
            width, height = self.size * 2 if len(self.size) == 1 else self.size
            ratio = min(width / image.width, height / image.height)
            inner = (max(round(image.width * ratio), 1), max(round(image.height * ratio), 1))
            canvas = Image.new("RGB", (width, height), self.colour)
            canvas.paste(self._resized(image, inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
            return canvas
        if len(self.size) == 2:
            return self._resized(image, (self.size[1], self.size[0]))
        (shorter,) = self.size
        image = middle(image)
        if image.width <= image.height:
            return self._resized(image, (shorter, int(shorter * image.height / image.width)))
        return self._resized(image, (int(shorter * image.width / image.height), shorter))

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image if image.size == size else image.resize(size, Image.Resampling(self.resample))


@dataclass(frozen=True)
class Stages:
    """All stages that change pixels, and the numbers of the last one."""

    stages: tuple[Stage, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (H, W, 3) uint8 RGB."""
        for stage in self.stages:
            image = stage.apply(image)
        return np.array(image)

    @property
    def min_side(self) -> int:
        return max(side for stage in self.stages for side in stage.size)


def read_stages(path: Path) -> Stages:
    """Read the stages under `stages` or `test`. Raises ModelError when they are missing, unknown or without sizes."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; choose another `preprocessing`") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    found = next((values[key] for key in ("stages", "test") if isinstance(values, dict) and key in values), None)
    if not isinstance(found, list):
        raise ModelError(f"{path}: expected a list of stages under `stages` or `test`")
    stages: list[Stage] = []
    mean: tuple[float, ...] = (0, 0, 0)
    std: tuple[float, ...] = (1, 1, 1)
    for stage in found:
        try:
            if stage["type"] == "normalize":
                mean, std = tuple(map(float, stage["mean"])), tuple(map(float, stage["std"]))
            elif stage["type"] not in _NO_PIXELS:
                stages.append(_stage(stage))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: stage {stage!r} is not understood ({error!r})") from error
    if not stages or len(mean) != 3 or len(std) != 3:
        raise ModelError(f"{path}: expected a stage with a size, and mean and std of three channels")
    return Stages(tuple(stages), mean, std)


def _stage(values: dict[str, Any]) -> Stage:
    kind, size = values["type"], values["size"]
    if kind not in ("pad_to_size", "resize", "center_crop"):
        raise ValueError(f"unknown type {kind!r}")
    sides = (int(size),) if isinstance(size, int) else tuple(int(side) for side in size)
    if len(sides) not in (1, 2):
        raise ValueError(f"size {size!r}")
    if values.get("max_size") is not None:
        raise ValueError(f"max_size {values['max_size']!r} is not supported")
    resample = _FILTERS[values.get("interpolation", "bilinear")]
    return Stage(kind, sides, resample, _colour(values.get("background_color", "white")))


def _colour(value: Any) -> tuple[int, ...]:
    return ImageColor.getrgb(value)[:3] if isinstance(value, str) else tuple(int(level) for level in value)[:3]
