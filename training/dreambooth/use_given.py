"""Use Stable Diffusion weights that somebody gives us, of no run: export them anew, make pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from training.config import Prompt, RunConfig
from training.config.dreambooth import DreamBoothConfig
from training.config.saving import SaveConfig, formats_of
from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.export import export_sd
from training.dreambooth.export.header import sd_modelspec
from training.dreambooth.networks import conditioning_of, load_model
from training.dreambooth.sampling.drawing import draw_pictures
from training.dreambooth.sampling.networks import SdPictures
from training.dreambooth.single_file.layout import UNET_PREFIX
from training.exports import write_export
from training.precision import DTYPES, choose_device
from training.preview import write_pictures
from training.recipes.base import ExportFile
from training.stage_c.text import load_tokenizer
from training.weight_files import open_weights

_UNET_SIGN = f"{UNET_PREFIX}input_blocks.0.0.weight"


def recipe_of(source: str, config: RunConfig | None) -> Literal["stage_c", "dreambooth"]:
    """Return which recipe given weights are for: the run's, where settings are given, else what they look like.

    A hub id, of which nothing is here to be looked at, is taken for stage C.
    """
    if config is not None:
        return config.recipe_name
    path = Path(source)
    if path.is_dir():
        return "dreambooth" if (path / "unet").is_dir() else "stage_c"
    if path.is_file():
        with open_weights(path) as file:
            return "dreambooth" if _UNET_SIGN in file.keys else "stage_c"
    return "stage_c"


def export_given_sd(
    source: str, output: Path, *, config: RunConfig | None, save: SaveConfig, dtype_name: str | None
) -> list[ExportFile]:
    """Write given weights in the formats of `save`, read back and compared. dtype_name: None keeps their format.

    Raises FileNotFoundError, WeightsError, ExportMismatchError, ValueError for a format that is stage C's.
    """
    if other := [name for name in save.export_formats if name not in formats_of("dreambooth")]:
        raise ValueError(
            f"--format {', '.join(other)} is for stage C; of Stable Diffusion there are "
            f"{', '.join(formats_of('dreambooth'))}"
        )
    settings = _settings(source, config)
    model = load_model(settings)
    title = config.name if config is not None else Path(source).stem
    header = {
        **sd_modelspec(model, title=title, extra=dict(save.modelspec)),
        **{key: value for key, value in model.metadata.items() if key.startswith(("ss_", "chunkline."))},
    }
    content = SdWeights(model=model, tokenizer=load_tokenizer(settings.tokenizer))
    dtype = DTYPES[dtype_name] if dtype_name is not None else _dtype_of(source)

    def write(partial: Path) -> list[ExportFile]:
        return export_sd(
            content, partial, formats=save.export_formats, dtype=dtype, title=title, header=header, card=save.model_card
        )

    return write_export(output, write, licences=save.licence_files)


def draw_given_sd(source: str, output: Path, *, config: RunConfig | None, prompts: tuple[Prompt, ...]) -> Iterator[str]:
    """Draw given weights; yield the files. Raises FileNotFoundError, WeightsError, ValueError for an odd prompt."""
    settings = _settings(source, config)
    for prompt in prompts:
        if problems := settings.prompt_problems(prompt):
            raise ValueError(f"prompt {prompt.text!r}: {'; '.join(problems)}")
    device = choose_device(config.device if config is not None else "auto")
    model = load_model(settings)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    conditioning = conditioning_of(model, settings, device=device)
    networks = SdPictures(
        family=model.family, unet=model.unet.to(device, dtype), vae=model.vae.to(device),
        text=conditioning.text, tokenizer=conditioning.tokenizer, prediction=model.prediction,
        max_tokens=settings.max_tokens, strict_tokens=settings.strict_tokens,
    )  # fmt: skip
    with torch.autocast(device.type, dtype=dtype, enabled=device.type != "cpu"):
        pictures = list(draw_pictures(prompts, networks=networks))
    global_step = int(model.metadata.get("chunkline.global_step", 0))
    yield from map(str, write_pictures(output, global_step, pictures, prompts))


def _settings(source: str, config: RunConfig | None) -> DreamBoothConfig:
    """Return the run's settings with these weights, or defaults."""
    if config is None:
        return DreamBoothConfig(model=source)
    return config.of_dreambooth.model_copy(update={"model": source, "weights": "plain"})


def _dtype_of(source: str) -> torch.dtype:
    """Return the number format of a file's, or a folder's, UNet."""
    path = Path(source)
    if path.is_dir():
        path = next(iter(sorted((path / "unet").glob("*.safetensors"))), path / "unet")
    if not path.is_file():
        return torch.float32
    with open_weights(path) as file:
        key = _UNET_SIGN if _UNET_SIGN in file.keys else "conv_in.weight"
        return file.tensor(key).dtype if key in file.keys else torch.float32
