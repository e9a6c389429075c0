"""The faults that `scripts.bench doctor` plants, and which rules must find each. Seeded by the picture's number."""

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Change = Callable[[Image.Image, int], Image.Image]

_LINES = ("I never thought it would end like this.", "What are you doing here?", "Wait! Do not leave me alone now.")
_COLOURS = ("black", "white", (16, 16, 40))


@dataclass(frozen=True)
class Fault:
    """rules: any of them finds it. follows: what it brings with it, so that finding that, too, is no false alarm."""

    change: Change
    rules: frozenset[str]
    follows: frozenset[str] = frozenset()


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _scaled(image: Image.Image, short_side: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    scale = short_side / min(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def _blurred(image: Image.Image, number: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / (260, 220, 180)[number % 3]))


def _enlarged(image: Image.Image, number: int) -> Image.Image:
    """As a thumbnail of 150 pixels looks when somebody made a wallpaper of it."""
    ways = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)
    return _scaled(_scaled(image, 150), 640, ways[number % 3])


def _letterboxed(image: Image.Image, number: int) -> Image.Image:
    height = image.height // (6, 9, 14)[number % 3]
    return ImageOps.expand(image, (0, height), _COLOURS[number % 3])


def _bordered(image: Image.Image, number: int) -> Image.Image:
    return ImageOps.expand(image, min(image.size) // (12, 20, 30)[number % 3], _COLOURS[(number + 1) % 3])


def _subtitled(image: Image.Image, number: int) -> Image.Image:
    result = image.copy()
    draw = ImageDraw.Draw(result)
    font = ImageFont.load_default(size=min(image.size) * (0.05, 0.06, 0.07)[number % 3])
    text = _LINES[number % 3]
    left = (image.width - draw.textlength(text, font=font)) / 2
    fill = ("white", "white", "yellow")[number % 3]
    draw.text((left, image.height * 0.87), text, font=font, fill=fill, stroke_width=3, stroke_fill="black")
    return result


def _tinted(image: Image.Image, number: int) -> Image.Image:
    bands = list(image.split())
    bands[number % 3] = bands[number % 3].point(lambda level: int(level * 0.75 + 64))
    bands[(number + 1) % 3] = bands[(number + 1) % 3].point(lambda level: int(level * 0.6))
    return Image.merge("RGB", bands)


def _film(image: Image.Image, number: int) -> Image.Image:
    return image.resize(((720, 480), (720, 576), (1440, 1080))[number % 3], Image.Resampling.LANCZOS)


def _widened(image: Image.Image, number: int) -> Image.Image:
    factor = (1.5, 1.8, 2.0)[number % 3]
    size = (round(image.width * factor), image.height) if number % 2 else (image.width, round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def _again(image: Image.Image, number: int) -> Image.Image:
    return ImageEnhance.Brightness(_scaled(image, min(image.size) * 9 // 10)).enhance((1.04, 1.08, 0.94)[number % 3])


_SHAPE = frozenset({"aspect"})
_LIGHT = frozenset({"contrast", "colour_cast", "over_exposure", "too_bright", "darkness"})
_SOFT = frozenset({"sharpness", "sharpness_in_set", "enlarged", "size"})

FAULTS = {
    "blurred": Fault(_blurred, frozenset({"sharpness", "sharpness_in_set", "enlarged"}), _SOFT | {"contrast"}),
    "dark": Fault(lambda image, number: ImageEnhance.Brightness(image).enhance((0.12, 0.18, 0.24)[number % 3]),
                  frozenset({"darkness"}), _LIGHT | {"text"}),
    "over_exposed": Fault(lambda image, number: image.point(lambda level: min(255, int(level * 1.7 + 70))),
                          frozenset({"over_exposure", "too_bright"}), _LIGHT | _SOFT),
    "low_contrast": Fault(lambda image, number: image.point(lambda level: int(level * 0.3 + (40, 90, 140)[number % 3])),
                          frozenset({"contrast"}), _LIGHT | _SOFT),
    "colour_cast": Fault(_tinted, frozenset({"colour_cast"}), _LIGHT),
    "squeezed_film": Fault(_film, frozenset({"squeezed"}), _SHAPE | {"stretched"}),
    "widened": Fault(_widened, frozenset({"stretched"}), _SHAPE | _SOFT),
    "letterboxed": Fault(_letterboxed, frozenset({"borders"}), _SHAPE | _LIGHT),
    "bordered": Fault(_bordered, frozenset({"borders"}), _SHAPE | _LIGHT),
    "subtitled": Fault(_subtitled, frozenset({"subtitle"}), frozenset({"text"})),
    "small": Fault(lambda image, number: _scaled(image, 160), frozenset({"size"}), _SOFT | {"text", "blockiness"}),
    "enlarged": Fault(_enlarged, frozenset({"enlarged", "sharpness"}), _SOFT | {"contrast"}),
    "jpeg_file": Fault(lambda image, number: image, frozenset({"jpeg_quality"}),
                       frozenset({"blockiness", "stretched"})),
    "jpeg_resaved": Fault(lambda image, number: _jpeg(image, (12, 20, 28)[number % 3]), frozenset({"blockiness"}),
                          frozenset({"sharpness", "stretched", "enlarged"})),
    "too_wide": Fault(lambda image, number: image.crop((0, image.height // 3, image.width,
                      image.height // 3 + min(image.height // 2, image.width // 4))), frozenset({"aspect"}),
                      _LIGHT | _SOFT | {"text", "subtitle", "stretched"}),
    "repeated": Fault(_again, frozenset({"repeated"}), _LIGHT | {"enlarged", "aspect"}),
}  # fmt: skip
