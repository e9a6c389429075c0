"""The changes that `scripts.bench dedupe` plants in pictures, and the files it writes.

Every base picture becomes one group of files: itself and one file per kind of change. Seeded: the same pictures make
the same files.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sharding.images import decode_rgb, encode_jpeg

VARIANT = "variant"
"""The kind that is not a duplicate: a mouth's worth of the picture is another."""

_MAX_PIXELS = 1_200_000  # a bench of camera-size pictures would measure decoders
_LINE = "What are you doing here?"

Change = Callable[[Image.Image, np.random.Generator], bytes]


def _jpeg(image: Image.Image, quality: int = 85) -> bytes:
    return encode_jpeg(image, quality=quality)


def _resize(image: Image.Image, share: float) -> Image.Image:
    return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS)


def _webp(image: Image.Image, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return buffer.getvalue()


def _crop(image: Image.Image, rng: np.random.Generator, *, aspect: float, share: float = 1.0) -> bytes:
    """Cut out the largest part of this aspect, or this share of its sides, at a random place."""
    width, height = min(image.width, image.height * aspect) * share, min(image.height, image.width / aspect) * share
    left, top = rng.random() * (image.width - width), rng.random() * (image.height - height)
    return _jpeg(image.crop((round(left), round(top), round(left + width), round(top + height))))


def _portrait(image: Image.Image, rng: np.random.Generator) -> bytes:
    return _crop(image, rng, aspect=9 / 16 if image.width >= image.height else 16 / 9)


def _other_screen(image: Image.Image, rng: np.random.Generator) -> bytes:
    aspect = 4 / 3 if image.width >= image.height else 3 / 4
    is_near = abs(np.log(image.width / image.height / aspect)) < 0.05
    return _crop(image, rng, aspect=16 / 9 if is_near else aspect)


def _text(image: Image.Image, rng: np.random.Generator) -> bytes:
    result = image.copy()
    draw = ImageDraw.Draw(result)
    place = (image.width * 0.05, image.height * (0.1 + 0.7 * rng.random()))
    draw.text(place, _LINE, "white", font_size=max(image.height // 20, 8), stroke_width=2, stroke_fill="black")
    return _jpeg(result)


def _variant(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Turn a piece of 1/12 of the shorter side upside down, and invert it: as large as a mouth in a half-length."""
    side = max(min(image.size) // 12, 4)
    left, top = (int(length * (0.3 + 0.4 * rng.random())) for length in image.size)
    box = (left, top, left + side, top + side)
    result = image.copy()
    result.paste(ImageOps.invert(ImageOps.flip(image.crop(box))), box)
    return _jpeg(result)


KINDS: dict[str, Change] = {
    "resize_quarter": lambda image, rng: _jpeg(_resize(image, 0.25)),
    "jpeg_30": lambda image, rng: _jpeg(image, 30),
    "webp": _webp,
    "brightness_30": lambda image, rng: _jpeg(image.point([min(round(level * 1.3), 255) for level in range(256)] * 3)),
    "text_line": _text,
    "mirror": lambda image, rng: _jpeg(ImageOps.mirror(image)),
    "crop_2_percent": lambda image, rng: _crop(image, rng, aspect=image.width / image.height, share=0.98),
    "crop_10_percent": lambda image, rng: _crop(image, rng, aspect=image.width / image.height, share=0.9),
    "other_screen": _other_screen,
    "square": lambda image, rng: _crop(image, rng, aspect=1.0),
    "portrait": _portrait,
    "border": lambda image, rng: _jpeg(ImageOps.expand(image, min(image.size) // 12, "white")),
    "letterbox": lambda image, rng: _jpeg(ImageOps.expand(image, (0, image.height // 6), "black")),
    VARIANT: _variant,
}


def plant(pictures: Sequence[Path], folder: Path) -> dict[str, tuple[int, str]]:
    """Write each picture and its changed versions into `folder`; return path → (number of the picture, kind)."""
    truth = {}
    for number, path in enumerate(pictures):
        image = decode_rgb(path.read_bytes())
        if image.width * image.height > _MAX_PIXELS:
            image = _resize(image, (_MAX_PIXELS / (image.width * image.height)) ** 0.5)
        rng = np.random.default_rng(number)
        files = {"base": _jpeg(image, 95)} | {kind: change(image, rng) for kind, change in KINDS.items()}
        for kind, data in files.items():
            name = f"{number:04}-{kind}.{'webp' if kind == 'webp' else 'jpg'}"
            (folder / name).write_bytes(data)
            truth[name] = (number, kind)
    return truth
