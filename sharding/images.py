"""Bytes of an image file → facts, or upright sRGB pixels; with a reason when that cannot be.

The one place that decodes. Orientation is applied, ICC profiles are converted to sRGB, alpha is laid on white,
CMYK, palette, 16-bit and grey become RGB. Sizes come from headers; nothing is allocated by a declared size before
it is checked against `max_pixels`. Formats: jpeg png webp avif jxl gif bmp tiff.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pillow_jxl  # noqa: F401  (registers JPEG XL with Pillow)
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from sharding.pictures.colours import is_srgb, to_upright_rgb
from sharding.pictures.jxl_header import is_jxl, jxl_size
from sharding.pictures.phash import hash_picture as hash_picture
from sharding.pictures.phash import is_flat as is_flat
from sharding.pictures.pillow_limit import pillow_limit

FORMATS = ("jpeg", "png", "webp", "avif", "jxl", "gif", "bmp", "tiff")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".jxl", ".gif", ".bmp", ".dib",
    ".tif", ".tiff",
)  # fmt: skip
MAX_PIXELS = 200_000_000
LOSSLESS_FORMATS = ("png", "gif", "bmp", "tiff")

_MIN_IMAGES_TO_JUDGE = 20

# Pillow opens MPO as JPEG; "MPO" itself is no opener and naming it breaks every format after it.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JXL", "GIF", "BMP", "DIB", "TIFF")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"\0\0\0\x0cJXL ")
_ORIENTATION = 0x0112
_DATE_TIME_ORIGINAL = 0x9003
_DATE_TIME = 0x0132
_EXIF_FOLDER = 0x8769
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    ZeroDivisionError, RuntimeError, MemoryError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


class ImageError(ValueError):
    """An image cannot be used. `reason` is a snake_case drop reason, `detail` the evidence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.reason, self.detail))


class BrokenFractionError(ValueError):
    """More images are broken than `max_broken_fraction` allows; the message has counts and the first reasons."""


def is_too_broken(num_broken: int, num_images: int, *, max_broken_fraction: float) -> bool:
    """Tell whether a stage must stop because too large a share of its images is broken.

    Fewer than 20 images are judged as if they were 20: one broken file of two says nothing about a source.
    """
    return num_broken > max_broken_fraction * max(num_images, _MIN_IMAGES_TO_JUDGE)


@dataclass(frozen=True)
class ImageFacts:
    """What the header says. width, height: pixels after EXIF rotation."""

    format: str
    width: int
    height: int
    mode: str
    has_alpha: bool
    is_animated: bool
    is_pass_through: bool
    """JPEG or PNG, upright, 8-bit RGB (or grey JPEG), without alpha or a colour profile other than sRGB."""
    exif_date: datetime | None
    """DateTimeOriginal, else DateTime, read as UTC; None when absent or nonsense."""

    @property
    def is_lossless(self) -> bool:
        return self.format in LOSSLESS_FORMATS


def probe(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Read the header only. Raises ImageError (empty_file, not_an_image, undecodable, too_many_pixels)."""
    with _quiet(max_pixels), _open(data, max_pixels) as image:
        try:
            return _facts(image, data)
        except _DECODE_ERRORS as error:
            raise ImageError("undecodable", _evidence(error)) from error


def decode_rgb(data: bytes, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to upright sRGB pixels in mode RGB, alpha laid on white; the first frame of an animation.

    min_side: pixels that are enough for the shorter side; a JPEG is then decoded at the smallest DCT scale
    (1, 1/2, 1/4, 1/8) that still covers it. Other formats are always decoded in full, and never resized here.

    Raises ImageError; a truncated file is `undecodable`, never a half grey picture.
    """
    return _decode(data, min_side, max_pixels, is_grey=False)


def decode_grey(data: bytes, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to upright grey pixels in mode L, otherwise as `decode_rgb`.

    The luma that a JPEG stores is taken as it is: its colours are not decoded unless a profile has to be applied. It
    differs from `decode_rgb(data).convert("L")` by a level, by more where the colours are outside of RGB.
    """
    return _decode(data, min_side, max_pixels, is_grey=True)


def _decode(data: bytes, min_side: int | None, max_pixels: int, *, is_grey: bool) -> Image.Image:
    with _quiet(max_pixels), _open(data, max_pixels) as image:
        try:
            is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            takes_luma = is_grey and is_jpeg and is_srgb(image.info.get("icc_profile"))
            if is_jpeg:
                image.draft("L" if takes_luma else image.mode, (min_side, min_side) if min_side else None)
                image.decodermaxblock = len(data)  # in pieces, the Huffman decoder runs slowly at the end of each
            image.load()
            if takes_luma:
                ImageOps.exif_transpose(image, in_place=True)
                return image
            rgb = to_upright_rgb(image)
            return rgb.convert("L") if is_grey else rgb
        except _DECODE_ERRORS as error:
            raise ImageError("undecodable", _evidence(error)) from error


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Encode RGB pixels as a baseline JPEG without chroma subsampling (4:4:4) and without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """Encode RGB pixels as PNG without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


@contextmanager
def _quiet(max_pixels: int) -> Iterator[None]:
    with pillow_limit.set_to(max_pixels), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    if not data:
        raise ImageError("empty_file", "0 bytes")
    if is_jxl(data):  # opening one decodes it
        try:
            _check_size(*jxl_size(data), max_pixels)
        except ValueError as error:
            raise error if isinstance(error, ImageError) else ImageError("undecodable", str(error)) from error
    Image.init()  # registers formats beyond Pillow's first five; a no-op from the second time on
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except Image.DecompressionBombError as error:
        declared = re.search(r"\d+", str(error))  # the sum; the sides are not told
        pixels = f"{int(declared[0]):,}" if declared else "too many"
        raise ImageError("too_many_pixels", f"{pixels} pixels, limit {max_pixels:,}") from error
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES):
            raise ImageError("undecodable", "starts like an image, but its header cannot be read") from error
        raise ImageError("not_an_image", f"starts with {data[:8].hex()}") from error
    except _DECODE_ERRORS as error:
        raise ImageError("undecodable", _evidence(error)) from error
    _check_size(image.width, image.height, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError("undecodable", f"declares {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width}x{height} pixels, limit {max_pixels:,}")


def _facts(image: ImageFile.ImageFile, data: bytes) -> ImageFacts:
    exif = _exif(image, data)
    orientation = exif.get(_ORIENTATION, 1)
    width, height = (image.height, image.width) if orientation in (5, 6, 7, 8) else image.size
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    file_format = {"mpo": "jpeg", "dib": "bmp"}.get(str(image.format).lower(), str(image.format).lower())
    has_16_bits = any("16" in str(tile.args) for tile in image.tile)  # "RGB;16B"; its mode is RGB all the same
    plain_mode = (image.mode == "RGB" and not has_16_bits) or (image.mode == "L" and file_format == "jpeg")
    is_animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    return ImageFacts(
        format=file_format,
        width=width,
        height=height,
        mode=image.mode,
        has_alpha=has_alpha,
        is_animated=is_animated,
        is_pass_through=(
            image.format in ("JPEG", "PNG")
            and plain_mode
            and not has_alpha
            and not is_animated
            and orientation in (0, 1)
            and is_srgb(image.info.get("icc_profile"))
        ),
        exif_date=_exif_date(exif),
    )


def _exif(image: ImageFile.ImageFile, data: bytes) -> Image.Exif:
    """Return the EXIF data. Of a PNG Pillow decodes all pixels first, to see what comes after them."""
    if image.format == "PNG" and not _has_exif_after_pixels(data):
        return Image.Image.getexif(image)
    return image.getexif()


def _has_exif_after_pixels(png: bytes) -> bool:
    position, after_pixels = len(b"\x89PNG\r\n\x1a\n"), False
    while position + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        after_pixels = after_pixels or kind == b"IDAT"
        is_text_profile = kind in (b"tEXt", b"zTXt", b"iTXt") and png.startswith(b"Raw profile type", position + 8)
        if after_pixels and (kind == b"eXIf" or is_text_profile):
            return True
        position += length + 12
    return False


def _exif_date(exif: Image.Exif) -> datetime | None:
    text = exif.get_ifd(_EXIF_FOLDER).get(_DATE_TIME_ORIGINAL) or exif.get(_DATE_TIME)
    if not isinstance(text, str):
        return None
    try:
        return datetime.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return None


def _evidence(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text[:200]
