"""From the bytes of a source file to the bytes that a shard stores: unchanged, or resized and encoded by policy.

Also the masks that go with them: from a file, or the original's own alpha. Always 8-bit grey, of the stored size.
Which file belongs to which sample is decided elsewhere (`pack_jobs`).
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from sharding.images import LOSSLESS_FORMATS, ImageError, decode_rgb, encode_jpeg, encode_png

UNREAD_BY = {
    name: "Stable Cascade's own loader and img2dataset's readers"
    + (", webdataset's decoders" if name in ("avif", "jxl") else "")
    for name in ("webp", "avif", "jxl", "gif", "bmp", "tiff")
}
"""Which readers skip or fail on a format that passes through unchanged."""
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImagePolicy:
    """How pixels are written: the settings of `[pack]` and the limits of `[filters]`."""

    jpeg_quality: int
    lossless_as_png: bool
    reencode: str
    max_pixels: int
    """Larger pictures are resized to at most this; 0: none are."""
    pass_through_formats: tuple[str, ...]
    min_source_pixels: int
    """A picture that is smaller than this after resizing is too small."""
    max_source_pixels: int


@dataclass(frozen=True)
class StoredImage:
    """What is stored of a picture. is_unchanged: the source's bytes."""

    data: bytes
    extension: str
    width: int
    height: int
    is_unchanged: bool


def stored_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the size of the same aspect, rounded down, that has at most max_pixels; 0: no limit."""
    if not max_pixels or width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def stored_image(data: bytes, record: Mapping[str, Any], policy: ImagePolicy) -> StoredImage:
    """Return what a shard stores of a picture.

    record: `format`, `width`, `height`, `is_pass_through`, `has_alpha`, `is_animated` of the kept record.
    Raises ImageError: what decoding finds, or `too_small_when_resized`.
    """
    width, height = record["width"], record["height"]
    size = stored_size(width, height, policy.max_pixels)
    if size == (width, height) and policy.reencode == "needed" and _passes(data, record, policy):
        extension = "jpg" if record["format"] == "jpeg" else record["format"]
        return StoredImage(data, extension, width, height, is_unchanged=True)
    pixels = decode_rgb(data, max_pixels=policy.max_source_pixels)
    if size != (width, height):
        size = stored_size(*pixels.size, policy.max_pixels)
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
        if size[0] * size[1] < policy.min_source_pixels:
            raise ImageError("too_small_when_resized", f"{size[0]}x{size[1]} pixels after pack.max_pixels")
    if policy.lossless_as_png and record["format"] in LOSSLESS_FORMATS:
        return StoredImage(encode_png(pixels), "png", *pixels.size, is_unchanged=False)
    return StoredImage(encode_jpeg(pixels, quality=policy.jpeg_quality), "jpg", *pixels.size, is_unchanged=False)


def _passes(data: bytes, record: Mapping[str, Any], policy: ImagePolicy) -> bool:
    if record["is_pass_through"]:
        return True
    if record["format"] not in policy.pass_through_formats or record["has_alpha"] or record["is_animated"]:
        return False
    with Image.open(io.BytesIO(data)) as image:
        is_upright = image.getexif().get(_ORIENTATION, 1) in (0, 1)
        return image.mode == "RGB" and is_upright and not image.info.get("icc_profile")


# --- masks ---


def mask_path(folder: Path, path: str) -> Path:
    """Return where the mask of the picture `path` lies: the same path and stem, as PNG."""
    return folder / PurePosixPath(path).with_suffix(".png")


def mask_of_file(data: bytes, record: Mapping[str, Any], stored: StoredImage) -> bytes:
    """Return the mask in `data`, of the stored picture's size. A grey PNG of that size is kept byte for byte.

    Raises ImageError (`bad_mask`) when it cannot be read or has another size than the picture.
    """
    try:
        mask = decode_rgb(data)
    except ImageError as error:
        raise ImageError("bad_mask", f"the mask is {error}") from error
    if mask.size != (record["width"], record["height"]):
        sizes = f"{mask.width}x{mask.height}, the picture {record['width']}x{record['height']}"
        raise ImageError("bad_mask", f"the mask has {sizes}")
    with Image.open(io.BytesIO(data)) as image:
        is_ready = (image.format, image.mode) == ("PNG", "L") and "transparency" not in image.info
    if is_ready and mask.size == (stored.width, stored.height):
        return data
    return _encoded(mask.convert("L"), stored)


def mask_of_alpha(data: bytes, stored: StoredImage) -> bytes:
    """Return the alpha channel of a picture that decodes, upright and of the stored size."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        return _encoded(upright.convert("RGBA").getchannel("A"), stored)


def _encoded(mask: Image.Image, stored: StoredImage) -> bytes:
    if mask.size != (stored.width, stored.height):
        # Bilinear, not Lanczos: that rings, and a mask's edge must not reach beyond itself.
        mask = mask.resize((stored.width, stored.height), Image.Resampling.BILINEAR)
    return encode_png(mask)
