"""What a recipe must offer so that latents and text outputs can be encoded ahead: its frozen encoders, by themselves.

Loading one does not load what is trained. A new recipe adds a line to each function here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from training.config import RunConfig


class Encoded(Protocol):
    """Latents of a batch. What was not finite in a lower precision has been tried in fp32."""

    @property
    def values(self) -> Tensor:
        """(B, C, h, w) float32: what the recipe makes latents of; for a VAE that is drawn from, mean and variance."""

    @property
    def broken(self) -> Mapping[int, str]:
        """Slots that cannot be trained, with the reason."""


class ImageEncoder(Protocol):
    """Pixels to latents."""

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of all that decides a latent besides the pixels, by config key."""

    def encode(self, images: Tensor) -> Encoded:
        """Return the latents of images (B, 3, H, W) uint8, as training from pixels would have them."""


class TextEncoder(Protocol):
    """Captions to what a network is conditioned on."""

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of all that decides an output besides the caption, by config key."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Return tensors of B rows each, as training would have them."""


def load_image_encoder(config: RunConfig, device: torch.device) -> ImageEncoder:
    """Load the frozen image encoder. Raises FileNotFoundError, WeightsError."""
    if config.dreambooth is not None:
        from training.dreambooth.latents import VaeEncoder

        return VaeEncoder(config.dreambooth, device=device)
    from training.stage_c.latents import LatentEncoder

    return LatentEncoder(config.of_stage_c, device=device)


def load_text_encoder(config: RunConfig, device: torch.device) -> TextEncoder:
    """Load the frozen text encoder. Raises FileNotFoundError, WeightsError."""
    if config.dreambooth is not None:
        from training.dreambooth.networks import load_conditioning

        return load_conditioning(config.dreambooth, device=device)
    from training.stage_c.conditioning import Conditioning

    return Conditioning(config.of_stage_c, device=device, dtype=torch.float32)


def image_rule(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what a picture's latent is, besides its size, for JSON."""
    if config.dreambooth is not None:
        return {"vae_dtype": config.dreambooth.vae_dtype}
    return {"effnet_dtype": config.of_stage_c.effnet_dtype}


def caption_rule(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what a caption's output is, for JSON."""
    of_stage_c, of_dreambooth = ("max_tokens", "attention_mask"), ("max_tokens", "strict_tokens", "clip_skip")
    names: tuple[str, ...] = of_stage_c if config.dreambooth is None else of_dreambooth
    return {name: getattr(config.recipe, name) for name in names}


def values_per_caption(config: RunConfig) -> int:
    """Return how many numbers a caption's output has, from the shapes of the encoder alone."""
    num_states = config.recipe.max_tokens + 2
    if config.dreambooth is not None:
        from training.memory.sd_architecture import sd_architecture

        texts = sd_architecture(config).texts
        pooled = texts[-1]["projection_dim"] if len(texts) > 1 else 0
        return int(num_states * sum(text["hidden_size"] for text in texts) + pooled)
    from training.memory.stage_c_architecture import stage_c_architecture

    text = stage_c_architecture(config).text
    return int(num_states * text.hidden_size + text.projection_dim)
