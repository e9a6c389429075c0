"""The parts of a diffusers folder, or of a hub id that holds one, as modules."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.dreambooth.single_file.layout import Family
from training.stage_c.hub import load_component
from training.weight_files import WeightsError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

AVERAGE_FOLDER = "unet_ema"
"""Beside `unet`, in folders that `create-model` and exports write."""


def folder_unet(source: str, dtype: torch.dtype, *, average: bool = False) -> "UNet2DConditionModel":
    """Return the UNet, or its average. Raises FileNotFoundError, WeightsError for builds that are not trained here."""
    from diffusers import UNet2DConditionModel

    if average and Path(source).is_dir() and not (Path(source) / AVERAGE_FOLDER).is_dir():
        raise WeightsError(f'{source}: no {AVERAGE_FOLDER}/ in it; take the plain weights (weights = "plain")')
    part = AVERAGE_FOLDER if average else "unet"
    unet = _part(source, UNet2DConditionModel, part, torch_dtype=dtype)
    if (channels := unet.config.in_channels) != 4:
        raise WeightsError(
            f"{source}: the UNet takes {channels} channels, not 4: an inpainting or editing model, which is not "
            "trained here"
        )
    kinds = {"class_embed_type": None, "time_cond_proj_dim": None}
    if other := [f"{name} {unet.config[name]!r}" for name, usual in kinds.items() if unet.config[name] != usual]:
        raise WeightsError(f"{source}: the UNet has {', '.join(other)}: a model of another build, not trained here")
    return unet


def family_of(unet: "UNet2DConditionModel") -> Family:
    """Return the family that a UNet belongs to."""
    if unet.config.addition_embed_type == "text_time":
        return "sdxl"
    return "sd2" if unet.config.use_linear_projection else "sd1"


def folder_vae(source: str, dtype: torch.dtype) -> "AutoencoderKL":
    """Return a pipeline's VAE, or one that is a folder or hub id of its own. Raises OSError when it is not there."""
    from diffusers import AutoencoderKL

    def load(path_or_id: str, *, subfolder: str) -> Any:
        return AutoencoderKL.from_pretrained(
            path_or_id, subfolder=subfolder, torch_dtype=dtype, output_loading_info=True
        )

    vae, info = load_component(load, source, "vae", file_name="config.json")
    return _whole(f"{source}: vae", vae, info)


def folder_texts(
    source: str, family: Family, dtype: torch.dtype
) -> "tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]":
    """Return the text models. Raises FileNotFoundError when one is missing, as in SDXL's refiner."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first = _part(source, CLIPTextModel, "text_encoder", dtype=dtype)
    if family != "sdxl":
        return (first,)
    return first, _part(source, CLIPTextModelWithProjection, "text_encoder_2", dtype=dtype)


def scheduler_config(source: str) -> dict[str, Any]:
    """Return the scheduler's settings."""
    path = Path(source) / "scheduler" / "scheduler_config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        with _finding(source):
            path = Path(hf_hub_download(source, "scheduler/scheduler_config.json"))
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _part(source: str, kind: Any, part: str, **options: Any) -> Any:
    with _finding(f"{source}: {part}"):
        module, info = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **options)
    return _whole(f"{source}: {part}", module, info)


def _whole(name: str, module: Any, info: Mapping[str, Any]) -> Any:
    """Return a module in which nothing was left as it was made: random. info: what `from_pretrained` says."""
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            raise WeightsError(f"{name}: {len(keys)} {problem.replace('_', ' ')}, first {keys[0]}")
    return module.eval()


@contextmanager
def _finding(source: str) -> Iterator[None]:
    """Turn what libraries raise into a FileNotFoundError that names the model and says what may be given."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{source}: {error}; give a single file, a diffusers folder or a hub id owner/name"
        ) from error
