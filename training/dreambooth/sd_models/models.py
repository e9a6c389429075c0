"""Load a Stable Diffusion model whole: UNet, VAE and text models, with what it predicts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.dreambooth.sd_models.file_parts import text_of, unet_of, vae_of, vae_of_file
from training.dreambooth.sd_models.folders import (
    family_of,
    folder_texts,
    folder_unet,
    folder_vae,
    scheduler_config,
)
from training.dreambooth.sd_models.prediction import (
    Prediction,
    PredictionType,
    prediction_of_file,
    prediction_of_scheduler,
)
from training.dreambooth.sd_models.shapes import LATENT_SCALE, detect_family
from training.dreambooth.single_file.layout import TEXT_PREFIXES, Family
from training.dreambooth.single_file.reading import open_single_file
from training.dreambooth.single_file.text_names import with_prefix
from training.tensor_file import digest_of_tensors
from training.weight_files import WeightsError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

NAMED_VAES: Mapping[str, str] = {"sdxl-fp16-fix": "madebyollin/sdxl-vae-fp16-fix"}
"""Hub ids of VAEs that may be given by a name."""
TEXT_NAMES = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class SdModel:
    """A loaded model; all parts in fp32 or the dtype asked for, on the CPU, in eval mode."""

    family: Family
    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL"
    texts: "tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]"
    prediction: Prediction
    source: Path | None
    """The single file it came from: exports are laid over it."""
    metadata: Mapping[str, str]
    """Of that file."""
    name: str = ""
    """The file, folder or hub id, as it was given."""
    is_average: bool = False
    """The UNet is the source's running average, not its plain weights."""
    has_own_vae: bool = True
    """The VAE is the source's; False: another was given."""


def load_sd(
    path_or_id: str,
    *,
    dtype: torch.dtype = torch.float32,
    extract_ema: bool = False,
    vae: str | None = None,
    prediction: PredictionType | None = None,
    zero_terminal_snr: bool | None = None,
) -> SdModel:
    """Load a single file (.safetensors, .ckpt), a diffusers folder, or a hub id. Needs no network but for a hub id.

    extract_ema: take the running average in place of the plain UNet. vae: in place of the model's own, see `load_vae`.
    prediction, zero_terminal_snr: in place of what the model says; an SD 2 file may say nothing. Raises WeightsError or
    FileNotFoundError saying what is wrong with it.
    """
    path = Path(path_or_id)
    if not path.exists() and (path.is_absolute() or path.suffix in (".safetensors", ".ckpt") or len(path.parts) > 2):
        raise FileNotFoundError(
            f"{path_or_id}: no such file or folder; give a single file, a diffusers folder or a hub id owner/name"
        )
    load = _load_file if path.is_file() else _load_folder
    model = load(path_or_id, dtype, average=extract_ema, vae=vae, prediction=prediction)
    if zero_terminal_snr is None:
        return model
    return replace(model, prediction=replace(model.prediction, zero_terminal_snr=zero_terminal_snr))


def load_vae(path_or_id: str, *, like: SdModel, dtype: torch.dtype = torch.float32) -> "AutoencoderKL":
    """Load another VAE for `like`: a bare or whole single file, a diffusers folder, a hub id, or one of NAMED_VAES.

    Raises FileNotFoundError when it is not there (without a network: not in the hub's cache), WeightsError when it is
    of another family.
    """
    return _given_vae(path_or_id, like.family, dtype)


def load_average(model: SdModel, *, dtype: torch.dtype = torch.float32) -> "UNet2DConditionModel":
    """Return the running average that the model's file or folder holds. Raises WeightsError when it holds none."""
    if model.source is None:
        return folder_unet(model.name, dtype, average=True)
    with open_single_file(model.source) as file:
        return unet_of(file, model.family, dtype, average=True)


def model_digest(model: SdModel) -> str:
    """Return the SHA-256 (hex) of all weights as they are in memory now: UNet, VAE, text models, by diffusers' names.

    The same for a file and a folder of the same weights. Reads every byte: 14 GB of an SDXL in fp32.
    """
    tensors = {f"unet.{key}": tensor for key, tensor in model.unet.state_dict().items()}
    tensors |= {f"vae.{key}": tensor for key, tensor in model.vae.state_dict().items()}
    for name, text in zip(TEXT_NAMES, model.texts, strict=False):
        tensors |= {f"{name}.{key}": tensor for key, tensor in with_prefix(text.state_dict()).items()}
    return digest_of_tensors(tensors)


def _load_file(
    path_or_id: str, dtype: torch.dtype, *, average: bool, vae: str | None, prediction: PredictionType | None
) -> SdModel:
    path = Path(path_or_id)
    with open_single_file(path) as file:
        family = detect_family(file.shapes, name=path_or_id)
        said = prediction_of_file(file, family, given=prediction)
        return SdModel(
            family=family,
            unet=unet_of(file, family, dtype, average=average),
            vae=vae_of(file, family, dtype) if vae is None else _given_vae(vae, family, dtype),
            texts=tuple(text_of(file, family, prefix, dtype) for prefix, _ in TEXT_PREFIXES[family]),
            prediction=said,
            source=path,
            metadata=dict(file.metadata),
            name=path_or_id,
            is_average=average,
            has_own_vae=vae is None,
        )


def _load_folder(
    path_or_id: str, dtype: torch.dtype, *, average: bool, vae: str | None, prediction: PredictionType | None
) -> SdModel:
    unet = folder_unet(path_or_id, dtype, average=average)
    family = family_of(unet)
    return SdModel(
        family=family,
        unet=unet,
        vae=folder_vae(path_or_id, dtype) if vae is None else _given_vae(vae, family, dtype),
        texts=folder_texts(path_or_id, family, dtype),
        prediction=prediction_of_scheduler(scheduler_config(path_or_id), given=prediction),
        source=None,
        metadata={},
        name=path_or_id,
        is_average=average,
        has_own_vae=vae is None,
    )


def _given_vae(path_or_id: str, family: Family, dtype: torch.dtype) -> "AutoencoderKL":
    if Path(path_or_id).is_file():
        return vae_of_file(Path(path_or_id), family, dtype)
    source = NAMED_VAES.get(path_or_id, path_or_id)
    try:
        vae = folder_vae(source, dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"VAE {path_or_id!r} is neither here nor, as {source}, in the hub's cache, and could not be downloaded "
            f"({str(error).splitlines()[0]}); give a file, a folder or a hub id, or once: hf download {source}"
        ) from error
    if vae.config.scaling_factor != LATENT_SCALE[family]:
        raise WeightsError(
            f"VAE {path_or_id!r}: its latents are scaled by {vae.config.scaling_factor}, those of {family} by "
            f"{LATENT_SCALE[family]}: it belongs to another family"
        )
    return vae
