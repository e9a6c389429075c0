"""Pictures made during training, as files: one PNG per prompt and one strip of all, named by the global step."""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sharding.files import open_replacing
from training.config import Prompt

_NAME = re.compile(r"step-(\d{8})-(strip|\d{2,})\.png")
_STRIP_HEIGHT = 256


def write_pictures(
    folder: Path, global_step: int, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
) -> list[Path]:
    """Write `step-00000256-00.png` … and `step-00000256-strip.png`, each whole or not at all.

    prompts: one per picture; each stands in its PNG's text `parameters`, in the form that web UIs read.
    """
    texts = {f"{number:02d}": parameters(prompt) for number, prompt in enumerate(prompts)}
    named = {f"{number:02d}": picture for number, picture in enumerate(pictures)}
    named["strip"] = strip(pictures, height=_STRIP_HEIGHT)
    paths = []
    for name, picture in named.items():
        path = folder / f"step-{global_step:08d}-{name}.png"
        with open_replacing(path) as stream:
            picture.save(stream, "PNG", pnginfo=_info(texts.get(name)))
        paths.append(path)
    return paths


def parameters(prompt: Prompt) -> str:
    """Return how a preview was made: `1girl⏎Negative prompt: …⏎Steps: 20, Sampler: ddpm, CFG scale: 4.0, Seed: …`."""
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    return (
        f"{prompt.text}{negative}\nSteps: {prompt.steps}, Sampler: {prompt.sampler}, CFG scale: {prompt.guidance}, "
        f"Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}"
    )


def _info(text: str | None) -> PngInfo | None:
    if text is None:
        return None
    info = PngInfo()
    info.add_itxt("parameters", text)
    return info


def read_pictures(folder: Path) -> dict[int, dict[str, Path]]:
    """Return the PNG files of previews by global step and chart name (`preview/strip`, `preview/00`, …)."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step-*.png")) if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[f"preview/{match[2]}"] = path
    return found


def is_drawn(folder: Path, global_step: int) -> bool:
    """Tell whether all previews of a step are there: the strip is written last."""
    return (folder / f"step-{global_step:08d}-strip.png").exists()


def remove_pictures(folder: Path, *, after_step: int) -> None:
    """Delete previews of later steps, which are trained again and may then look otherwise."""
    for step, named in read_pictures(folder).items():
        if step > after_step:
            for path in named.values():
                path.unlink(missing_ok=True)


def strip(pictures: Sequence[Image.Image], *, height: int) -> Image.Image:
    """Return the pictures side by side, each scaled to `height` pixels."""
    scaled = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    sheet = Image.new("RGB", (sum(picture.width for picture in scaled), height))
    left = 0
    for picture in scaled:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet
