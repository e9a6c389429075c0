"""Repair one picture, in memory: upright and flat, without bars, then upscale → levels → crop → downscale.

Writes nothing. Each step that changes something leaves a line for people.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sharding.images import decode_rgb, probe
from training.dreambooth.doctor.boxes import Box
from training.dreambooth.doctor.fix.levels import CONTRAST, LEVEL, auto_contrast, auto_level, change
from training.dreambooth.doctor.fix.ratios import crop_to, nearest_ratio
from training.dreambooth.doctor.fix.upscale import Upscaler
from training.dreambooth.doctor.pictures import orientation, pixel_aspect
from training.dreambooth.doctor.pixels import Bars, find_bars
from training.dreambooth.doctor.rules import FixRules

_EDGE = 2  # pixels of a picture that a bar's edge is smeared over
_MIN_SIDE = 16  # pixels that must be left between bars
_SQUARE = 0.02  # pixels whose aspect is nearer to 1 are square
_MAX_STRETCH = 2.5  # a file that says more says nonsense


@dataclass(frozen=True)
class Opened:
    """A picture as it should have been: decoded, square pixels, no bars. kept: of its sides, what is not bar."""

    image: Image.Image
    steps: tuple[str, ...]
    kept: Box


@dataclass(frozen=True)
class Repaired:
    """A finished copy. end: of its name, behind the original's."""

    end: str
    image: Image.Image
    steps: tuple[str, ...]


def open_picture(path: Path) -> Opened:
    """Read a picture upright, flat and without bars. Raises ImageError."""
    data = path.read_bytes()
    facts = probe(data)
    image = decode_rgb(data)
    aspect = pixel_aspect(data)
    steps = [
        text
        for is_so, text in (
            (orientation(data) not in (0, 1), "turned as its EXIF says"),
            (facts.has_alpha, "transparency laid on white"),
            (facts.is_animated, "first frame of an animation"),
            (facts.mode not in ("RGB", "RGBA", "L", "P", "LA", "PA"), f"{facts.mode} made RGB"),
        )
        if is_so
    ]
    if abs(aspect - 1) > _SQUARE and 1 / _MAX_STRETCH < aspect < _MAX_STRETCH:
        steps.append(f"stretched {aspect:.2f} times: its pixels are not square")
        image = image.resize((round(image.width * aspect), image.height), Image.Resampling.LANCZOS)
    bars = find_bars(image)
    inside, told = _without(bars, image)
    if told and min(inside.size) >= _MIN_SIDE:
        image = inside
        steps.append(told)
    kept = Box("", bars.left, bars.top, 1 - bars.right, 1 - bars.bottom)
    return Opened(image, tuple(steps), kept)


def finish(
    opened: Opened,
    settings: FixRules,
    *,
    upscaler: Upscaler | None = None,
    keep: Sequence[Box] = (),
    ends: Sequence[str] = (LEVEL, CONTRAST),
) -> list[Repaired]:
    """Return the copy, and those with levels beside it when they are asked for.

    keep: what the crop should not cut, as shares of the file's sides. ends: which copies may be made beside it.
    """
    image, steps = opened.image, list(opened.steps)
    if upscaler is not None:
        image = upscaler.enlarge(image, settings.upscale)
        steps.append(f"upscaled {settings.upscale:g} times" if settings.upscale != 1 else "cleaned by the upscaler")
    copies = _levelled(image, settings, ends)
    inside = [_within(opened.kept, box) for box in keep]
    return [_shaped(end, copy, [*steps, *told], settings, inside) for end, copy, told in copies]


def _without(bars: Bars, image: Image.Image) -> tuple[Image.Image, str]:
    sides = {"left": bars.left, "top": bars.top, "right": bars.right, "bottom": bars.bottom}
    whole = {"left": image.width, "top": image.height, "right": image.width, "bottom": image.height}
    cut = {side: round(share * whole[side]) + _EDGE if share else 0 for side, share in sides.items()}
    told = ", ".join(f"{side} {pixels}" for side, pixels in cut.items() if pixels)
    box = (cut["left"], cut["top"], image.width - cut["right"], image.height - cut["bottom"])
    return image.crop(box), f"bars cut off ({told} pixels)" if told else ""


def _levelled(image: Image.Image, settings: FixRules, ends: Sequence[str]) -> list[tuple[str, Image.Image, list[str]]]:
    raw: tuple[str, Image.Image, list[str]] = ("", image, [])
    if settings.levels == "no":
        return [raw]
    level, contrast = auto_level(image), auto_contrast(image)
    changes = change(image, level) > settings.levels_change
    if settings.levels == "replace":
        return [("", level, ["auto level"])] if changes else [raw]
    copies = [raw]
    if changes and LEVEL in ends:
        copies.append((LEVEL, level, ["auto level"]))
    is_other = change(contrast, level) > settings.levels_change or not changes
    if change(image, contrast) > settings.levels_change and is_other and CONTRAST in ends:
        copies.append((CONTRAST, contrast, ["auto contrast"]))
    return copies


def _shaped(end: str, image: Image.Image, steps: list[str], settings: FixRules, keep: Sequence[Box]) -> Repaired:
    ratio = nearest_ratio(*image.size)
    if ratio.loss > settings.max_crop:
        steps.append(f"not cropped: {ratio.name} would cost {ratio.loss:.0%}")
    elif (ratio.width, ratio.height) != image.size:
        image = crop_to(image, ratio, keep=keep)
        steps.append(f"cropped to {ratio.name} (-{ratio.loss:.1%})")
    longest = max(image.size)
    if settings.long_side and longest > settings.long_side:
        size = (round(image.width * settings.long_side / longest), round(image.height * settings.long_side / longest))
        steps.append(f"{image.width}x{image.height} brought down to {size[0]}x{size[1]}")
        image = image.resize(size, Image.Resampling.LANCZOS)
    return Repaired(end, image, tuple(steps))


def _within(kept: Box, box: Box) -> Box:
    """Return a box of the file as one of what is left of it."""
    width, height = kept.right - kept.left, kept.bottom - kept.top
    across = [min(max((side - kept.left) / width, 0), 1) for side in (box.left, box.right)]
    down = [min(max((side - kept.top) / height, 0), 1) for side in (box.top, box.bottom)]
    return Box(box.label, across[0], down[0], across[1], down[1], box.score)
