"""Auto level and auto contrast, as image editors have them; and whether they change a picture at all."""

from pathlib import Path

from PIL import Image, ImageChops, ImageOps, ImageStat

LEVEL, CONTRAST = "-level", "-contrast"
"""Ends of the names of copies that stand beside a raw one."""
CUT_PERCENT = 0.5
"""Of the darkest and of the lightest pixels, what may become black and white."""


def auto_level(image: Image.Image) -> Image.Image:
    """Stretch each channel to its full range: takes a colour cast away, too."""
    return ImageOps.autocontrast(image, cutoff=CUT_PERCENT)


def auto_contrast(image: Image.Image) -> Image.Image:
    """Stretch all channels by the same amount, that of the luma: colours keep their tone."""
    return ImageOps.autocontrast(image, cutoff=CUT_PERCENT, preserve_tone=True)


def change(one: Image.Image, other: Image.Image) -> float:
    """Return the mean difference of two pictures of one size, from 0 to 1."""
    return float(sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / (3 * 255))


def raw_name(path: Path) -> Path:
    """Return the path of the raw picture that a copy stands beside, without suffix; of another picture its own."""
    name = path.with_suffix("").name
    return path.with_name(name.removesuffix(LEVEL).removesuffix(CONTRAST))
