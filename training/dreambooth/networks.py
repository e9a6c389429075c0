"""What the settings name, loaded: the model with its VAE, what it predicts, and its attention. Frozen, on the CPU."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from training.config.dreambooth import DreamBoothConfig
from training.dreambooth.conditioning import Conditioning
from training.dreambooth.sd_models.models import SdModel, load_sd, load_vae
from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.text import SdText
from training.stage_c.text import load_tokenizer

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

logger = logging.getLogger(__name__)


def load_model(settings: DreamBoothConfig) -> SdModel:
    """Return the model in fp32, nothing of it trained. Raises FileNotFoundError, WeightsError, ValueError."""
    model = load_sd(settings.model, extract_ema=settings.weights == "ema")
    if settings.vae is not None:
        model = replace(model, vae=load_vae(settings.vae, like=model))
    for module in (model.unet, model.vae, *model.texts):
        module.requires_grad_(False)
    return replace(model, prediction=prediction_of(settings, model.prediction))


def prediction_of(settings: DreamBoothConfig, said: Prediction) -> Prediction:
    """Return what is trained: as the settings say, else as the model does. Raises ValueError when it cannot be."""
    if settings.prediction != "auto" and settings.prediction != said.kind:
        logger.warning(
            "dreambooth.prediction %s: %s says %s", settings.prediction, said.said_by, said.kind,
        )  # fmt: skip
        said = replace(said, kind=settings.prediction, said_by="dreambooth.prediction")
    if settings.zero_terminal_snr is not None:
        said = replace(said, zero_terminal_snr=settings.zero_terminal_snr)
    if said.zero_terminal_snr and said.kind == "epsilon":
        raise ValueError(
            f"dreambooth.zero_terminal_snr: {settings.model} predicts epsilon ({said.said_by}), and pure noise says "
            'nothing about epsilon; set prediction = "v_prediction" to teach it that, or zero_terminal_snr = false'
        )
    return said


def set_attention(unet: "UNet2DConditionModel", kind: str) -> None:
    """Choose the UNet's attention. Raises ValueError when xformers is not installed or has no GPU."""
    if kind == "sliced":
        unet.set_attention_slice("auto")
    elif kind == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f'dreambooth.attention "xformers": {error}; "sdpa" needs no package and as little memory'
            ) from error


def load_conditioning(settings: DreamBoothConfig, *, device: torch.device) -> Conditioning:
    """Return tokenizer and text models of the settings' model, frozen."""
    return conditioning_of(load_model(settings), settings, device=device)


def conditioning_of(
    model: SdModel, settings: DreamBoothConfig, *, device: torch.device, has_gradients: bool = False
) -> Conditioning:
    """Return tokenizer and text models of a loaded model, put on the device; see Conditioning for has_gradients."""
    text = SdText(model.family, model.texts, clip_skip=settings.clip_skip).requires_grad_(False).to(device).eval()
    tokenizer = load_tokenizer(settings.tokenizer)
    return Conditioning(settings, text, tokenizer, device=device, has_gradients=has_gradients)
