"""The folder of a StableDiffusionPipeline or StableDiffusionXLPipeline.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/
    SDXL: text_encoder_2/   tokenizer_2/        with an average: unet_ema/

model_index.json is written last, so that a folder without it was cut short. Paths of this machine are in none of it.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharding.files import write_json
from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.model_card import PIPELINES
from training.dreambooth.sd_models.folders import AVERAGE_FOLDER
from training.dreambooth.sd_models.models import TEXT_NAMES
from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.single_file.layout import Family
from training.dreambooth.single_file.text_names import with_prefix
from training.dreambooth.text import pad_ids
from training.stage_c.prior_folder import write_tokenizer
from training.weight_files import WeightsReport, write_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

MODEL_INDEX = "model_index.json"
TOKENIZER_NAMES = ("tokenizer", "tokenizer_2")
_DIFFUSERS_VERSION = "0.27.0"
_SCHEDULERS: Mapping[Family, str] = {"sd1": "DDIMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
"""Both know schedules that end in pure noise; the published PNDM does not."""
_NOT_OF_THE_MODEL = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")


def write_sd_folder(
    folder: Path, content: SdWeights, *, dtype: torch.dtype, header: Mapping[str, str]
) -> list[WeightsReport]:
    """Write all but the README; return one report per weights file. header: metadata of the UNet's file."""
    model, whole = content.model, content.whole
    assert whole.unet is not None and whole.vae is not None
    (folder / MODEL_INDEX).unlink(missing_ok=True)
    reports = [
        _write_module(folder / "unet", model.unet, whole.unet, dtype, header),
        _write_module(folder / "vae", model.vae, whole.vae, dtype, {}),
    ]
    if whole.average is not None:
        reports.append(_write_module(folder / AVERAGE_FOLDER, model.unet, whole.average, dtype, header))
    for name, module, tensors in zip(TEXT_NAMES, model.texts, whole.texts, strict=False):
        assert tensors is not None
        reports.append(_write_text(folder / name, module, tensors, dtype))
    for name, pad_id in zip(TOKENIZER_NAMES, pad_ids(model.family), strict=False):
        write_tokenizer(_padding_with(content.tokenizer, pad_id), folder / name)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_settings(model.family, model.prediction))
    write_json(folder / MODEL_INDEX, _index(content))
    return reports


def scheduler_settings(family: Family, prediction: Prediction) -> dict[str, Any]:
    """Return scheduler_config.json. A schedule that ends in pure noise must be sampled from its end: `trailing`."""
    own = {"clip_sample": False, "set_alpha_to_one": False} if _SCHEDULERS[family] == "DDIMScheduler" else {}
    return {
        "_class_name": _SCHEDULERS[family],
        "_diffusers_version": _DIFFUSERS_VERSION,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction.kind,
        "rescale_betas_zero_snr": prediction.zero_terminal_snr,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if prediction.zero_terminal_snr else "leading",
        **own,
    }


def _write_module(
    folder: Path,
    module: "UNet2DConditionModel | AutoencoderKL",
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    header: Mapping[str, str],
) -> WeightsReport:
    report = write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, dtype=dtype, metadata=header)
    values = {key: value for key, value in module.config.items() if not key.startswith("_")}
    named = {"_class_name": type(module).__name__, "_diffusers_version": _DIFFUSERS_VERSION}
    write_json(folder / "config.json", {**values, **named})
    return report


def _write_text(
    folder: Path,
    module: "CLIPTextModel | CLIPTextModelWithProjection",
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> WeightsReport:
    report = write_tensors(folder / "model.safetensors", with_prefix(tensors), dtype=dtype)
    values = {key: value for key, value in module.config.to_dict().items() if value is not None}
    named = {"architectures": [type(module).__name__]}
    write_json(folder / "config.json", {key: values[key] for key in values if key not in _NOT_OF_THE_MODEL} | named)
    return report


def _padding_with(tokenizer: "PreTrainedTokenizerBase", pad_id: int) -> "PreTrainedTokenizerBase":
    """Return a tokenizer that fills up as its text model expects: SD 2's and SDXL's second one with `!`."""
    changed = deepcopy(tokenizer)
    changed.pad_token = changed.convert_ids_to_tokens(pad_id)
    return changed


def _index(content: SdWeights) -> dict[str, Any]:
    family = content.model.family
    values: dict[str, Any] = {
        "_class_name": PIPELINES[family],
        "_diffusers_version": _DIFFUSERS_VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", _SCHEDULERS[family]],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for name, module in zip(TEXT_NAMES, content.model.texts, strict=False):
        values[name] = ["transformers", type(module).__name__]
    for name in TOKENIZER_NAMES[: len(content.model.texts)]:
        values[name] = ["transformers", "CLIPTokenizer"]
    if family == "sdxl":
        return {**values, "force_zeros_for_empty_prompt": True}
    return {**values, "safety_checker": [None, None], "requires_safety_checker": False}
