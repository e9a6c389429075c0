"""Put a file of adapters into a Stable Diffusion model, and write it whole: no run needed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from training.dreambooth.adapters.files import read_adapters
from training.dreambooth.adapters.names import UNET, text_parts
from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.export import export_sd
from training.dreambooth.export.header import sd_modelspec
from training.dreambooth.sd_models.models import SdModel, load_sd
from training.dreambooth.sd_models.prediction import PredictionType
from training.exports import write_export
from training.lora.layers import adaptable
from training.lora.merging import merge_into
from training.recipes.base import ExportFile
from training.stage_c.text import load_tokenizer

SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024}
"""Pixels that the published models of each family were trained at, for headers."""


def merge_sd(
    base: str,
    adapters: Path,
    output: Path,
    *,
    scale: float,
    formats: Sequence[str],
    dtype: torch.dtype,
    prediction: PredictionType | None = None,
) -> list[ExportFile]:
    """Write `base` with `adapters` in it. scale: 1 is as it was trained, 0 is the base.

    prediction: of an SD 2 file that does not say it. Raises AdapterError for layers that the base does not have,
    FileNotFoundError, WeightsError.
    """
    model = load_sd(base, prediction=prediction)
    modules = modules_of(model)
    layers = {part: adaptable(module) for part, module in modules.items()}
    found = read_adapters(adapters, family=model.family, layers=layers)
    for part, own in found.items():
        merge_into(modules[part].state_dict(), own, scale=scale, source=str(adapters))
    content = SdWeights(
        model=model,
        tokenizer=load_tokenizer(base if Path(base).is_dir() else "builtin"),
        unet=model.unet.state_dict() if UNET in found else None,
        texts=tuple(modules[part].state_dict() if part in found else None for part in text_parts(model.family)),
    )
    title, side = f"{Path(base).stem} with {adapters.stem}", SIDES[model.family]
    merged_from = {"merged_from": f"{Path(base).name}, {adapters.name} × {scale:g}"}
    header = sd_modelspec(model, title=title, width=side, height=side, extra=merged_from)
    return write_export(
        output, lambda partial: export_sd(content, partial, formats=formats, dtype=dtype, title=title, header=header)
    )


def modules_of(model: SdModel) -> dict[str, nn.Module]:
    """Return the networks that adapters go on, by component."""
    return {UNET: model.unet, **dict(zip(text_parts(model.family), model.texts, strict=True))}
