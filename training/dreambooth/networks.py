"""What the settings name, loaded and frozen: the model with its VAE, its text conditioning, its attention."""

from typing import TYPE_CHECKING

import torch

from training.config.dreambooth import DreamBoothConfig
from training.dreambooth.conditioning import Conditioning
from training.dreambooth.sd_models.models import SdModel, load_sd
from training.dreambooth.text import SdText
from training.stage_c.text import load_tokenizer

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def load_model(settings: DreamBoothConfig) -> SdModel:
    """Return the model in fp32 on the CPU. Raises FileNotFoundError, WeightsError, or ValueError for settings that do
    not fit it."""
    model = load_sd(
        settings.model,
        extract_ema=settings.weights == "ema",
        vae=settings.vae,
        prediction=None if settings.prediction == "auto" else settings.prediction,
        zero_terminal_snr=settings.zero_terminal_snr,
    )
    if model.prediction.zero_terminal_snr and model.prediction.kind == "epsilon":
        raise ValueError(
            f"dreambooth.zero_terminal_snr: {settings.model} predicts epsilon ({model.prediction.said_by}), and pure "
            'noise says nothing about epsilon; set prediction = "v_prediction" to teach it that, or zero_terminal_snr '
            "= false"
        )
    for module in (model.unet, model.vae, *model.texts):
        module.requires_grad_(False)
    return model


def load_conditioning(settings: DreamBoothConfig, *, device: torch.device) -> Conditioning:
    """Return tokenizer and text models of the settings' model."""
    return conditioning_of(load_model(settings), settings, device=device)


def conditioning_of(
    model: SdModel, settings: DreamBoothConfig, *, device: torch.device, has_gradients: bool = False
) -> Conditioning:
    """Return tokenizer and text models of a loaded model, put on the device; see Conditioning for has_gradients."""
    text = SdText(model.family, model.texts, clip_skip=settings.clip_skip).requires_grad_(False).to(device).eval()
    tokenizer = load_tokenizer(settings.tokenizer)
    return Conditioning(settings, text, tokenizer, device=device, has_gradients=has_gradients)


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
