"""Have class images drawn by the model that a run starts from. The model is loaded only when one is missing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.files import digest_of, write_json
from training.config import RunConfig
from training.config.dreambooth import DreamBoothConfig
from training.dreambooth.class_images.wanted import ClassImage

if TYPE_CHECKING:
    from training.dreambooth.sampling.networks import SdPictures

FOLDER = "class_images"
"""Folder of a workspace that they lie in, whatever chunk they are packed into."""
_MODELS = ".models.json"
"""Hidden file of that folder: digests of models by what their files looked like."""


def draw_class_images(
    config: RunConfig, wanted: Sequence[ClassImage], folder: Path, *, dry_run: bool = False
) -> list[Path | None]:
    """Return where each class image lies, in order; those that are not there are made, or None with dry_run.

    Raises what loading the model raises, ValueError when an image cannot be drawn; those before it are there.
    """
    from training.dreambooth.class_images.making import is_made, make_class_images, path_of
    from training.dreambooth.class_images.model import digest

    look = _look_of(config.of_dreambooth)
    known = _read_known(folder / _MODELS)
    found: list[Path | None] = [None] * len(wanted)
    if look is not None and look in known:
        paths = [path_of(image, folder, model_digest=known[look]) for image in wanted]
        found = [path if is_made(image, path) else None for image, path in zip(wanted, paths, strict=True)]
    if dry_run or None not in found:
        return found
    networks = _load(config)
    model_digest = digest(networks)
    if look is not None:
        write_json(folder / _MODELS, {**known, look: model_digest})
    return [*make_class_images(wanted, folder, networks=networks, model_digest=model_digest)]


def _load(config: RunConfig) -> "SdPictures":
    from training.dreambooth.networks import conditioning_of, load_model
    from training.dreambooth.sampling.networks import SdPictures
    from training.precision import choose_device

    settings, device = config.of_dreambooth, choose_device(config.device)
    model = load_model(settings)
    conditioning = conditioning_of(model, settings, device=device)
    return SdPictures(
        family=model.family,
        unet=model.unet.to(device),
        vae=model.vae.to(device),
        text=conditioning.text,
        tokenizer=conditioning.tokenizer,
        prediction=model.prediction,
        max_tokens=settings.max_tokens,
        strict_tokens=settings.strict_tokens,
    )


def _look_of(settings: DreamBoothConfig) -> str | None:
    """Return a digest of the names, sizes and times of the model's files; None when they are not all files here."""
    names = [settings.model, *([settings.vae] if settings.vae is not None else [])]
    names += [settings.tokenizer] * (settings.tokenizer != "builtin")
    stamps = []
    for path in map(Path, names):
        if not path.exists():
            return None
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        stamps += [[str(one.absolute()), one.stat().st_size, one.stat().st_mtime_ns] for one in files]
    used = ("weights", "clip_skip", "max_tokens", "strict_tokens", "prediction", "zero_terminal_snr")
    return digest_of([stamps, {name: getattr(settings, name) for name in used}])


def _read_known(path: Path) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return known
