"""Decoded pixels of any mode and profile → upright sRGB pixels in mode RGB.

Alpha is laid on white; 16-bit, palette, grey, CMYK and LAB become RGB; a colour profile is applied unless it says
sRGB. Decoding is done in `images`.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

_SRGB_TOLERANCE = 3  # levels by which profiles that all call themselves sRGB differ


@lru_cache(maxsize=16)
def is_srgb(profile: bytes | None) -> bool:
    """Tell by 216 colours, not by the profile's name, which may say sRGB of linear light."""
    if not profile:
        return True
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (ImageCms.PyCMSError, OSError):
        return True  # an unreadable profile is ignored when decoding, too
    if source.profile.xcolor_space != "RGB ":
        return False
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    try:
        converted = ImageCms.profileToProfile(Image.fromarray(colours), source, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError):
        return False
    return bool(np.abs(np.asarray(converted).astype(int) - colours).max() <= _SRGB_TOLERANCE)


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Return decoded pixels turned upright, in sRGB, mode RGB; may change the image it is given."""
    profile = image.info.get("icc_profile")
    if image.format in ("JPEG", "PNG"):  # the others hold more than pixels, which a copy lets go of
        ImageOps.exif_transpose(image, in_place=True)
    else:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        # Pillow clips 16-bit grey to 255 when it converts; scale instead.
        samples = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(samples / 257.0 + 0.5, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        samples = np.nan_to_num(np.asarray(image), nan=0.0, posinf=1.0, neginf=0.0)
        scale = 255.0 if samples.max() <= 1.0 else 1.0
        image = Image.fromarray(np.clip(samples * scale + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "RGBa"):
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    rgb = _convert_profile(image, profile)
    if alpha is not None:
        background = Image.new("RGB", rgb.size, (255, 255, 255))
        background.paste(rgb, mask=alpha)
        return background
    return rgb


def _convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    colours = image.convert("RGB") if image.mode in ("RGBA", "1") else image
    plain = colours if colours.mode == "RGB" else colours.convert("RGB")
    if not profile or is_srgb(profile) or colours.mode not in ("RGB", "CMYK", "L"):
        return plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return plain  # a profile that does not fit the pixels is ignored, as every viewer does
    return plain if converted is None else converted
