"""Pictures made during training, as files: one PNG per prompt and one strip of all, named by the global step."""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sharding.files import open_replacing

_NAME = re.compile(r"step-(\d{8})-(strip|\d{2})\.png")
_STRIP_HEIGHT = 256


def write_pictures(folder: Path, global_step: int, pictures: Sequence[Image.Image]) -> list[Path]:
    """Write `step-00000256-00.png` … and `step-00000256-strip.png`, each whole or not at all."""
    named = {f"{number:02d}": picture for number, picture in enumerate(pictures)}
    named["strip"] = strip(pictures, height=_STRIP_HEIGHT)
    paths = []
    for name, picture in named.items():
        path = folder / f"step-{global_step:08d}-{name}.png"
        with open_replacing(path) as stream:
            picture.save(stream, "PNG")
        paths.append(path)
    return paths


def read_pictures(folder: Path) -> dict[int, dict[str, Path]]:
    """Return the PNG files of previews by global step and chart name (`preview/strip`, `preview/00`, …)."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step-*.png")) if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[f"preview/{match[2]}"] = path
    return found


def strip(pictures: Sequence[Image.Image], *, height: int) -> Image.Image:
    """Return the pictures side by side, each scaled to `height` pixels."""
    scaled = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    sheet = Image.new("RGB", (sum(picture.width for picture in scaled), height))
    left = 0
    for picture in scaled:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet
