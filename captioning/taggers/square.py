"""A picture in a square for the WD taggers: as the model's author pads and resizes, or as the tools people used did.

The four ways give slightly different probabilities, so tags near a threshold differ; a policy's thresholds belong to
one of them. Colours come out as BGR.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from captioning.plugin import Pixels
from captioning.taggers.resampling import area_mean, lanczos4, to_uint8

Geometry = Literal["demo", "kohya", "kohya_087", "tag_editor"]
WHITE = (255, 255, 255)
_BAND_PIXELS = 1 << 24
_ORIENTATION = 0x0112
"""EXIF tag."""


@dataclass(frozen=True)
class SquarePreparer:
    """Pad to a square with white and resize to `side`, RGB → BGR.

    demo: Pillow's bicubic (the model author's demo, imgutils, dataset-helpers). kohya: OpenCV's area for a larger
    square, else Pillow's Lanczos. kohya_087: the same with OpenCV's Lanczos (kohya v0.8.7 and before). tag_editor: the
    picture is resized with Lanczos first, then its edge pixels are repeated (Dataset Tag Editor).
    """

    side: int
    geometry: Geometry = "demo"

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (side, side, 3) uint8 BGR."""
        if self.geometry == "demo":
            square = self._bicubic(image)
        elif self.geometry == "tag_editor":
            square = self._repeated(image)
        elif max(image.size) > self.side:
            square = self._area(image)
        elif self.geometry == "kohya":
            square = np.asarray(pad(image).resize((self.side, self.side), Image.Resampling.LANCZOS))
        else:
            square = lanczos4(np.asarray(pad(image)), self.side)
        return np.ascontiguousarray(square[:, :, ::-1])

    @property
    def min_side(self) -> int:
        return self.side

    def _bicubic(self, image: Image.Image) -> Pixels:
        width, height = image.size
        if width > height:
            # Pillow resizes rows first and columns of the result afterwards. White rows stay white in the first pass,
            # so it can be done before they are added: same pixels, without a square of camera size.
            image = pad(image.resize((self.side, height), Image.Resampling.BICUBIC), longest=width, is_wide=True)
        elif height > width:
            image = self._narrowed(image)
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(image)

    def _narrowed(self, image: Image.Image) -> Image.Image:
        """Return a tall picture, padded to a square and resized to `side` columns, a band of rows at a time.

        The pass over rows takes each by itself, and a strip of 1,000 x 60,000 pixels would be a square of 14 GB.
        """
        width, height = image.size
        if height * height <= _BAND_PIXELS:
            return pad(image)
        narrow = Image.new("RGB", (self.side, height))
        num_rows = _BAND_PIXELS // height
        for top in range(0, height, num_rows):
            band = image.crop((0, top, width, min(top + num_rows, height)))
            padded = pad(band, longest=height, is_wide=False)
            narrow.paste(padded.resize((self.side, band.height), Image.Resampling.BICUBIC), (0, top))
        return narrow

    def _area(self, image: Image.Image) -> Pixels:
        """Shrink along the longer side first; the lines that are missing along the other one are white."""
        pixels = np.asarray(image)
        longest, along = max(image.size), 0 if image.height >= image.width else 1
        shrunk = area_mean(pixels, self.side, axis=along)
        missing = longest - pixels.shape[1 - along]
        ends = [(0, 0), (0, 0), (0, 0)]
        ends[1 - along] = (missing // 2, missing - missing // 2)
        return to_uint8(area_mean(np.pad(shrunk, ends, constant_values=255), self.side, axis=1 - along))

    def _repeated(self, image: Image.Image) -> Pixels:
        width, height = image.size
        inner_width = self.side if width >= height else max(width * self.side // height, 1)
        inner_height = self.side if height >= width else max(height * self.side // width, 1)
        inner = np.asarray(image.resize((inner_width, inner_height), Image.Resampling.LANCZOS))
        left, top = (self.side - inner_width) // 2, (self.side - inner_height) // 2
        rows, columns = (top, self.side - inner_height - top), (left, self.side - inner_width - left)
        return np.pad(inner, (rows, columns, (0, 0)), mode="edge")


@dataclass(frozen=True)
class OpaquePreparer:
    """As SquarePreparer, on the file's own colours: alpha dropped so that hidden colours show, neither rotation nor
    colour profile applied. What kohya v0.8.7 and its stable-cascade branch saw. Only such files are decoded again."""

    square: SquarePreparer

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (side, side, 3) uint8 BGR of a picture that had nothing to drop."""
        return self.square.prepare(image)

    def prepare_file(self, data: bytes, image: Image.Image) -> Pixels:
        """Return (side, side, 3) uint8 BGR."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of just what is asked for
            with Image.open(io.BytesIO(data)) as file:
                is_plain = file.mode == "RGB" and not {"transparency", "icc_profile"} & set(file.info)
                if is_plain and file.getexif().get(_ORIENTATION, 1) == 1:
                    return self.square.prepare(image)
                return self.square.prepare(file.convert("RGB"))

    @property
    def min_side(self) -> int:
        return self.square.min_side


def pad(image: Image.Image, *, longest: int | None = None, is_wide: bool | None = None) -> Image.Image:
    """Centre a picture on white; longest, is_wide: of the picture before it was resized along its longer side."""
    longest = max(image.size) if longest is None else longest
    is_wide = image.width > image.height if is_wide is None else is_wide
    size = (image.width, longest) if is_wide else (longest, image.height)
    padded = Image.new("RGB", size, WHITE)
    padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return padded
