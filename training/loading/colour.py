"""Change a picture's colours a little, by counted randomness."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from training.randomness import SampleIdentity


@dataclass(frozen=True)
class ColourJitter:
    """How far colours may move; all 0 is off. Raises ValueError for numbers out of range."""

    brightness: float = 0.0
    """Colours are multiplied by a factor between 1 - brightness and 1 + brightness."""
    contrast: float = 0.0
    """The same factor on the distance to the crop's mean grey."""
    saturation: float = 0.0
    """The same factor on the distance to each pixel's grey."""
    hue: float = 0.0
    """Hues are turned by up to this part of the colour circle, either way."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, most = getattr(self, one.name), 0.5 if one.name == "hue" else 1.0
            if not 0 <= value <= most:
                raise ValueError(f"colour_jitter.{one.name}: must be between 0 and {most:g}, got {value}")

    @property
    def is_on(self) -> bool:
        return any(getattr(self, one.name) for one in fields(self))


def jittered(pixels: npt.NDArray[np.uint8], jitter: ColourJitter, *, identity: SampleIdentity) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3) sRGB pixels with brightness, contrast, saturation and hue moved, in this order.

    Four numbers are drawn whatever is on, so switching one on does not move the others.
    """
    drawn = identity.generator("colour").uniform(-1, 1, 4)
    brightness, contrast, saturation = 1 + drawn[:3] * (jitter.brightness, jitter.contrast, jitter.saturation)
    image = Image.fromarray(pixels)
    for enhance, factor in (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    ):
        if factor != 1:
            image = enhance(image).enhance(float(factor))
    turn = round(float(drawn[3]) * jitter.hue * 256) % 256
    if turn:
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] += np.uint8(turn)  # around the circle: 256 steps are a whole turn
        image = Image.fromarray(hsv, "HSV").convert("RGB")
    return np.asarray(image)
