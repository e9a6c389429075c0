"""Load a Stable Diffusion model whole: UNet, VAE, text models and tokenizers, with what it predicts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from training.dreambooth.sd_models.prediction import Prediction, prediction_of_file, prediction_of_scheduler
from training.dreambooth.sd_models.shapes import Shapes, detect_family, text_settings, unet_settings, vae_settings
from training.dreambooth.single_file.layout import EMA_PREFIX, TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, Family
from training.dreambooth.single_file.text_names import from_openclip, with_prefix
from training.dreambooth.single_file.unet_names import unet_names
from training.dreambooth.single_file.vae_names import vae_names
from training.weight_files import OpenWeights, WeightsError, load_into, open_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

ModuleType = TypeVar("ModuleType", bound=nn.Module)


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


def load_sd(path_or_id: str, *, dtype: torch.dtype = torch.float32, extract_ema: bool = False) -> SdModel:
    """Load a single file (.safetensors, .ckpt), a diffusers folder, or a hub id. Needs no network but for a hub id.

    extract_ema: take the file's running average in place of the plain UNet. Raises WeightsError or FileNotFoundError
    saying what is wrong with it.
    """
    path = Path(path_or_id)
    if path.is_file():
        return _load_file(path, dtype, extract_ema=extract_ema)
    if extract_ema:
        raise WeightsError(f"{path_or_id}: a diffusers folder keeps its average apart; name that folder instead")
    return _load_folder(path_or_id, dtype)


def load_vae(path_or_id: str, *, like: SdModel, dtype: torch.dtype = torch.float32) -> "AutoencoderKL":
    """Load another VAE for `like`: a bare or whole single file, a diffusers folder, or a hub id."""
    from diffusers import AutoencoderKL

    path = Path(path_or_id)
    if not path.is_file():
        with _naming(path_or_id):
            return AutoencoderKL.from_pretrained(path_or_id, torch_dtype=dtype).eval()
    with open_weights(path) as file:
        bare = not any(key.startswith(VAE_PREFIX) for key in file.keys)
        renamed = replace(
            file,
            keys=tuple(VAE_PREFIX + key for key in file.keys) if bare else file.keys,
            tensor=(lambda key: file.tensor(key.removeprefix(VAE_PREFIX))) if bare else file.tensor,
        )
        return _vae(renamed, _shapes(renamed), like.family, dtype)


# --- a single file ---


def _load_file(path: Path, dtype: torch.dtype, *, extract_ema: bool) -> SdModel:
    with open_weights(path) as file:
        family = detect_family(file.keys, name=str(path))
        shapes = _shapes(file)
        return SdModel(
            family=family,
            unet=_unet(file, shapes, family, dtype, extract_ema=extract_ema),
            vae=_vae(file, shapes, family, dtype),
            texts=tuple(_text(file, shapes, family, prefix, dtype) for prefix, _ in TEXT_PREFIXES[family]),
            prediction=prediction_of_file(file, family),
            source=path,
            metadata=dict(file.metadata),
        )


def _shapes(file: OpenWeights) -> Shapes:
    return {key: tuple(file.tensor(key).shape) for key in file.keys}


def _unet(
    file: OpenWeights, shapes: Shapes, family: Family, dtype: torch.dtype, *, extract_ema: bool
) -> "UNet2DConditionModel":
    from diffusers import UNet2DConditionModel

    def original(name: str) -> str:
        return _ema_key(file, name) if extract_ema else UNET_PREFIX + name

    with _naming(file.path):
        settings = unet_settings(shapes, family)
    unet = _empty(lambda: UNet2DConditionModel(**settings))
    names = unet_names(unet.state_dict())
    return _filled(unet, {key: original(name) for key, name in names.items()}, file, dtype)


def _ema_key(file: OpenWeights, name: str) -> str:
    """Return where a file keeps a parameter's average: without dots, as LDM writes it; d8ahazard's variant, too."""
    plain = name.replace(".", "")
    for key in (f"{EMA_PREFIX}diffusion_model{plain}", f"{EMA_PREFIX}{plain}"):
        if key in file.keys:
            return key
    raise WeightsError(f"{file.path}: no running average of {name} in it; load it without extract_ema")


def _vae(file: OpenWeights, shapes: Shapes, family: Family, dtype: torch.dtype) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    with _naming(file.path):
        settings = vae_settings(shapes, family)
    vae = _empty(lambda: AutoencoderKL(**settings))
    names = vae_names(vae.state_dict())
    return _filled(vae, {key: VAE_PREFIX + name for key, name in names.items()}, file, dtype)


def _text(
    file: OpenWeights, shapes: Shapes, family: Family, prefix: str, dtype: torch.dtype
) -> "CLIPTextModel | CLIPTextModelWithProjection":
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    is_second = prefix != TEXT_PREFIXES[family][0][0]
    config = CLIPTextConfig(**text_settings(shapes, prefix, skips_last_layer=family == "sd2"))
    model = _empty(lambda: (CLIPTextModelWithProjection if is_second else CLIPTextModel)(config))
    own = {key.removeprefix(prefix): file.tensor(key) for key in file.keys if key.startswith(prefix)}
    tensors = from_openclip(own) if "positional_embedding" in own else with_prefix(own)
    state = model.state_dict()
    wanted = {with_prefix_name(key): key for key in state}
    found = {wanted[key]: tensor.to(dtype, copy=True) for key, tensor in tensors.items() if key in wanted}
    load_into(model, _with_buffers(state, found), source=file.path)
    return model.eval()


def with_prefix_name(key: str) -> str:
    """Return a live CLIP text model's parameter name as files have it."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def _with_buffers(state: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the found tensors with position numbers, where a module keeps them in its state."""
    numbers = {
        key: torch.arange(tensor.shape[-1]).unsqueeze(0)
        for key, tensor in state.items()
        if key.endswith("position_ids")
    }
    return {**numbers, **found}


def _empty(make: Callable[[], ModuleType]) -> ModuleType:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def _filled(module: ModuleType, names: Mapping[str, str], file: OpenWeights, dtype: torch.dtype) -> ModuleType:
    """Fill a module from a file. names: {parameter: key in the file}. Raises WeightsError naming missing keys."""
    there = set(file.keys)
    if missing := sorted(name for name in names.values() if name not in there):
        raise WeightsError(f"{file.path}: {len(missing)} of {len(names)} keys are missing, first {missing[0]}")
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    tensors = {key: file.tensor(name).to(dtype, copy=True).reshape(shapes[key]) for key, name in names.items()}
    load_into(module, tensors, source=file.path)
    return module.eval()


# --- a folder ---


def _load_folder(path_or_id: str, dtype: torch.dtype) -> SdModel:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with _naming(path_or_id):
        unet = UNet2DConditionModel.from_pretrained(path_or_id, subfolder="unet", torch_dtype=dtype)
        vae = AutoencoderKL.from_pretrained(path_or_id, subfolder="vae", torch_dtype=dtype)
        texts = [CLIPTextModel.from_pretrained(path_or_id, subfolder="text_encoder", dtype=dtype)]
        if is_sdxl := unet.config.addition_embed_type == "text_time":
            second = CLIPTextModelWithProjection.from_pretrained(path_or_id, subfolder="text_encoder_2", dtype=dtype)
            texts.append(second)
    family: Family = "sdxl" if is_sdxl else "sd2" if unet.config.use_linear_projection else "sd1"
    prediction = prediction_of_scheduler(_scheduler_config(path_or_id))
    for module in (unet, vae, *texts):
        module.eval()
    return SdModel(family, unet, vae, tuple(texts), prediction, None, {})


def _scheduler_config(path_or_id: str) -> dict[str, Any]:
    path = Path(path_or_id) / "scheduler" / "scheduler_config.json"
    if not Path(path_or_id).is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(path_or_id, "scheduler/scheduler_config.json"))
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


class _naming:
    """Turn what libraries raise into an error that names the model and says what may be given."""

    def __init__(self, source: Path | str) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise FileNotFoundError(
                f"{self._source}: {error}; give a single file, a diffusers folder or a hub id owner/name"
            ) from error
        if isinstance(error, WeightsError):
            raise WeightsError(f"{self._source}: {error}") from error
