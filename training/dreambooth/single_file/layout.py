"""A whole Stable Diffusion model in the original layout: which part stands behind which prefix, and what files add."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.dreambooth.single_file.text_names import openclip_text, with_prefix
from training.dreambooth.single_file.unet_names import unet_names
from training.dreambooth.single_file.vae_names import vae_names, vae_tensor

Family = Literal["sd1", "sd2", "sdxl"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."
_CLIP, _OPENCLIP = "clip", "openclip"
TEXT_PREFIXES: Mapping[Family, tuple[tuple[str, str], ...]] = {
    "sd1": (("cond_stage_model.transformer.", _CLIP),),
    "sd2": (("cond_stage_model.model.", _OPENCLIP),),
    "sdxl": (("conditioner.embedders.0.transformer.", _CLIP), ("conditioner.embedders.1.model.", _OPENCLIP)),
}
"""(prefix, form) of each text model, in diffusers' order."""
_LOGIT_SCALE = 4.6052
"""ln 100, where OpenCLIP's training ends; no reader of these files uses it."""


@dataclass(frozen=True)
class Parts:
    """State dicts of diffusers' and transformers' modules; a part that is None is not written."""

    unet: Mapping[str, Tensor] | None = None
    vae: Mapping[str, Tensor] | None = None
    texts: tuple[Mapping[str, Tensor] | None, ...] = ()
    average: Mapping[str, Tensor] | None = None
    """The UNet's running average, written beside it."""


def original_tensors(family: Family, parts: Parts) -> dict[str, Tensor]:
    """Return the parts under the original names, in the original shapes, and nothing else.

    Raises ValueError for a parameter that the family does not have.
    """
    found: dict[str, Tensor] = {}
    if parts.unet is not None:
        names = unet_names(parts.unet)
        found |= {UNET_PREFIX + names[key]: tensor for key, tensor in parts.unet.items()}
    if parts.average is not None:
        names = unet_names(parts.average)
        found |= {average_key(names[key]): tensor for key, tensor in parts.average.items()}
    if parts.vae is not None:
        names = vae_names(parts.vae)
        found |= {VAE_PREFIX + names[key]: vae_tensor(names[key], tensor) for key, tensor in parts.vae.items()}
    for (prefix, form), text in zip(TEXT_PREFIXES[family], parts.texts, strict=False):
        if text is not None:
            tensors = with_prefix(text) if form == _CLIP else openclip_text(text)
            found |= {prefix + key: tensor for key, tensor in tensors.items()}
    return found


def average_key(name: str) -> str:
    """Return where a file keeps the average of a UNet's parameter, an original name: without dots, as LDM writes it."""
    return f"{EMA_PREFIX}diffusion_model{name.replace('.', '')}"


def filled_up(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with those that files have and modules lack, where there is no source file to keep them from.

    Position numbers of CLIP-L; of SD 2's OpenCLIP the 24th layer and the projection, which diffusers never loads and no
    reader uses: the layer is a copy of the last one, as kohya writes it; the projection is the identity.
    """
    added = dict(tensors)
    for prefix, form in TEXT_PREFIXES[family]:
        position = tensors.get(f"{prefix}text_model.embeddings.position_embedding.weight")
        if form == _CLIP and position is not None:
            added[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(len(position)).unsqueeze(0)
        if form == _OPENCLIP and (width := tensors.get(f"{prefix}ln_final.weight")) is not None:
            added.setdefault(f"{prefix}logit_scale", torch.tensor(_LOGIT_SCALE))
            if family == "sd2":
                added.setdefault(f"{prefix}text_projection", torch.eye(len(width), dtype=width.dtype))
                added |= _one_more_layer(prefix + "transformer.resblocks.", tensors)
    return added


def _one_more_layer(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(key.removeprefix(prefix).partition(".")[0]) for key in tensors if key.startswith(prefix))
    start = f"{prefix}{last}."
    return {
        f"{prefix}{last + 1}.{key.removeprefix(start)}": tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith(start)
    }
