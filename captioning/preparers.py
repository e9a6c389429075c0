"""Decoded image → pixels in the size of a network: the ways of resizing that several plug-ins share.

Frozen dataclasses, so that models with equal ones share the result. Numbers such as mean and standard deviation are
applied to whole batches by the models.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from captioning.plugin import Pixels

CropRounding = Literal["transformers", "openai"]
_LONGEST_STRIP = 64


@dataclass(frozen=True)
class Squash:
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


@dataclass(frozen=True)
class CentreCrop:
    """Resize the shorter side to `shortest`, bicubic, then cut `crop` × `crop` from the centre. Source: CLIP.

    rounding: where the centre of an odd rest is: transformers rounds the left edge down, OpenAI's own transforms round
    it to the nearest even number; one pixel of difference.
    """

    shortest: int
    crop: int
    rounding: CropRounding = "transformers"

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (crop, crop, 3) uint8 RGB."""
        image = middle(image)
        width, height = image.size
        if width <= height:
            size = (self.shortest, int(self.shortest * height / width))
        else:
            size = (int(self.shortest * width / height), self.shortest)
        left, top = (self._start(side) for side in size)
        # Cutting and scaling in one call would sample other pixels; the resized picture is small.
        resized = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + self.crop, top + self.crop)))

    def _start(self, side: int) -> int:
        rest = side - self.crop
        return rest // 2 if self.rounding == "transformers" else round(rest / 2)

    @property
    def min_side(self) -> int:
        return self.shortest


def middle(image: Image.Image) -> Image.Image:
    """Return the middle of a strip longer than 64 times its width, anything else as it is.

    For who scales the shorter side and then crops the centre: of 65,535 x 1 pixels it would make 13 GB.
    """
    width, height = image.size
    longest = _LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
