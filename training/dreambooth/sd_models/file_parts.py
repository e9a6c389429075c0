"""The parts of a single file as modules: UNet or its running average, VAE, text models. Nothing here knows folders."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from training.dreambooth.sd_models.shapes import text_settings, unet_settings, vae_settings
from training.dreambooth.single_file.layout import (
    EMA_PREFIX,
    TEXT_PREFIXES,
    UNET_PREFIX,
    VAE_PREFIX,
    Family,
    average_key,
)
from training.dreambooth.single_file.reading import open_single_file
from training.dreambooth.single_file.text_names import from_openclip, with_prefix, with_prefix_name
from training.dreambooth.single_file.unet_names import unet_names
from training.dreambooth.single_file.vae_names import vae_names
from training.weight_files import OpenWeights, WeightsError, load_into, naming

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def has_average(file: OpenWeights) -> bool:
    """Return whether a file holds a running average of its UNet."""
    return any(key.startswith(EMA_PREFIX) and key.endswith("weight") for key in file.shapes)


def unet_of(file: OpenWeights, family: Family, dtype: torch.dtype, *, average: bool) -> "UNet2DConditionModel":
    """Return the UNet, or its average. Raises WeightsError when it is of another build, or not whole."""
    from diffusers import UNet2DConditionModel

    with naming(file.path):
        settings = unet_settings(file.shapes, family)
    unet = empty(lambda: UNet2DConditionModel(**settings))
    names = unet_names(unet.state_dict())
    known = {UNET_PREFIX + name for name in names.values()}
    if unknown := sorted(key for key in file.shapes if key.startswith(UNET_PREFIX) and key not in known):
        raise WeightsError(
            f"{file.path}: its UNet has {len(unknown)} tensors that Stable Diffusion's has not, first {unknown[0]}: a "
            "model of another build (distilled, pruned, with additions), which is not trained here"
        )
    if average:
        keys = {key: _average_key(file, name) for key, name in names.items()}
    else:
        keys = {key: UNET_PREFIX + name for key, name in names.items()}
    return _filled(unet, keys, file, dtype)


def _average_key(file: OpenWeights, name: str) -> str:
    """Return where a file keeps a parameter's average: as LDM writes it, or d8ahazard's extension."""
    for key in (average_key(name), f"{EMA_PREFIX}{name.replace('.', '')}"):
        if key in file.shapes:
            return key
    raise WeightsError(f'{file.path}: no running average of {name} in it; take the plain weights (weights = "plain")')


def vae_of(file: OpenWeights, family: Family, dtype: torch.dtype) -> "AutoencoderKL":
    """Return the VAE. Raises WeightsError when there is none, or another one."""
    from diffusers import AutoencoderKL

    with naming(file.path):
        settings = vae_settings(file.shapes, family)
    vae = empty(lambda: AutoencoderKL(**settings))
    names = vae_names(vae.state_dict())
    return _filled(vae, {key: VAE_PREFIX + name for key, name in names.items()}, file, dtype)


def vae_of_file(path: Path, family: Family, dtype: torch.dtype) -> "AutoencoderKL":
    """Return the VAE of a file that holds a whole model, or a VAE alone."""
    with open_single_file(path) as file:
        if any(key.startswith(VAE_PREFIX) for key in file.shapes):
            return vae_of(file, family, dtype)
        shapes = {VAE_PREFIX + key: shape for key, shape in file.shapes.items()}
        whole = replace(file, shapes=shapes, tensor=lambda key: file.tensor(key.removeprefix(VAE_PREFIX)))
        return vae_of(whole, family, dtype)


def text_of(
    file: OpenWeights, family: Family, prefix: str, dtype: torch.dtype
) -> "CLIPTextModel | CLIPTextModelWithProjection":
    """Return the text model behind a prefix. Raises WeightsError when it is not whole."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    is_second = prefix != TEXT_PREFIXES[family][0][0]
    with naming(file.path):
        config = CLIPTextConfig(**text_settings(file.shapes, prefix, skips_last_layer=family == "sd2"))
    model = empty(lambda: (CLIPTextModelWithProjection if is_second else CLIPTextModel)(config))
    own = {key.removeprefix(prefix): file.tensor(key) for key in file.shapes if key.startswith(prefix)}
    tensors = from_openclip(own) if "positional_embedding" in own else with_prefix(own)
    state = model.state_dict()
    wanted = {with_prefix_name(key): key for key in state}
    found = {wanted[key]: tensor.to(dtype, copy=True) for key, tensor in tensors.items() if key in wanted}
    load_into(model, _with_buffers(state, found), source=file.path)
    return model.eval()


def _with_buffers(state: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the found tensors with position numbers, where a module keeps them in its state."""
    numbers = {
        key: torch.arange(tensor.shape[-1]).unsqueeze(0)
        for key, tensor in state.items()
        if key.endswith("position_ids")
    }
    return {**numbers, **found}


def empty(make: Callable[[], ModuleType]) -> ModuleType:
    """Return a module whose parameters take no memory until they are given; its buffers are there."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def _filled(module: ModuleType, names: Mapping[str, str], file: OpenWeights, dtype: torch.dtype) -> ModuleType:
    """Fill a module from a file. names: {parameter: key in the file}. Raises WeightsError naming missing keys."""
    if missing := sorted(name for name in names.values() if name not in file.shapes):
        raise WeightsError(f"{file.path}: {len(missing)} of {len(names)} keys are missing, first {missing[0]}")
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    tensors = {key: file.tensor(name).to(dtype, copy=True).reshape(shapes[key]) for key, name in names.items()}
    load_into(module, tensors, source=file.path)
    return module.eval()
