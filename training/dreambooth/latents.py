"""Pixels of a batch → what the VAE says of them → latents, and which of them cannot be trained.

The VAE gives a mean and a variance; a latent is drawn from them anew at each exposure, so that what is encoded ahead
loses nothing. All randomness is counted by a sample's identity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.chunk_data import Batch
from training.config.dreambooth import DreamBoothConfig
from training.precision import DTYPES
from training.randomness import SampleIdentity, normal
from training.tensor_file import digest_of_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NOT_FINITE = "its latents are not finite, in fp32 either"
_LEAST_LOGVAR, _MOST_LOGVAR = -30.0, 20.0
"""Between which diffusers' DiagonalGaussianDistribution keeps the logarithm of the variance."""


@dataclass(frozen=True)
class Latents:
    """values: float32, all finite. broken: slot → why its values are zeros."""

    values: Tensor
    broken: Mapping[int, str] = field(default_factory=dict)


class VaeEncoder:
    """The frozen VAE of a run. vae: as loaded, or None to load the one that the settings name when it is first asked.

    Raises FileNotFoundError, WeightsError.
    """

    def __init__(self, settings: DreamBoothConfig, *, device: torch.device, vae: "AutoencoderKL | None" = None) -> None:
        self._settings, self._device, self._given = settings, device, vae
        self._compute = DTYPES[settings.vae_dtype]

    @cached_property
    def vae(self) -> "AutoencoderKL":
        """The network, in fp32, on the device."""
        return self._loaded.to(self._device).requires_grad_(False).eval()

    @cached_property
    def _loaded(self) -> "AutoencoderKL":
        """The network where it was loaded: of latents made ahead only its numbers are asked for."""
        if self._given is not None:
            return self._given
        from training.dreambooth.networks import load_model

        return load_model(self._settings).vae

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of the weights, by config key."""
        return {"dreambooth.vae": digest_of_tensors(self.vae.state_dict())}

    def of(self, batch: Batch) -> Latents:
        """Return the latents (B, 4, h, w) of a batch, from its pictures or from what was encoded ahead."""
        if batch.latents is not None:
            encoded = Latents(batch.latents.to(self._device, non_blocking=True).float())
        else:
            assert batch.images is not None
            encoded = self.encode(batch.images)
        return Latents(self.drawn(encoded.values, batch.identities), encoded.broken)

    def drawn(self, moments: Tensor, identities: Sequence[SampleIdentity]) -> Tensor:
        """Return latents (B, C, h, w) as a UNet sees them. moments: (B, 2 C, h, w), mean and logarithm of variance."""
        mean, logvar = moments.chunk(2, dim=1)
        if self._settings.latent_draw == "sample":
            spread = (0.5 * logvar.clamp(_LEAST_LOGVAR, _MOST_LOGVAR)).exp()
            noise = torch.stack([torch.from_numpy(normal(one, "latent", tuple(mean.shape[1:]))) for one in identities])
            mean = mean + spread * noise.to(mean)
        config = self._loaded.config
        scale = float(config["scaling_factor"])
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return mean * scale
        shift, std = (torch.tensor(config[key]).view(1, -1, 1, 1).to(mean) for key in ("latents_mean", "latents_std"))
        return (mean - shift) * scale / std

    def encode(self, images: Tensor) -> Latents:
        """Return moments (B, 8, h, w) of images (B, 3, H, W) uint8: mean and logarithm of the variance.

        On a CPU each is encoded alone: there the bits depend on a picture's neighbours, and what is encoded ahead has
        others. Those that come out not finite are made again in fp32 (SDXL's VAE overflows in fp16); what is not
        finite then either becomes zeros, and broken.
        """
        pixels = images.to(self._device, non_blocking=True).float() / 127.5 - 1
        together = 1 if self._device.type == "cpu" else len(pixels)
        moments = torch.cat([self._moments(some, self._compute) for some in torch.split(pixels, together)])
        slots = _not_finite(moments)
        if slots and self._compute != torch.float32:
            moments[slots] = torch.cat([self._moments(pixels[slot][None], torch.float32) for slot in slots])
            slots = _not_finite(moments)
        moments[slots] = 0
        return Latents(moments, dict.fromkeys(slots, NOT_FINITE))

    @torch.no_grad()
    def _moments(self, pixels: Tensor, compute: torch.dtype) -> Tensor:
        with torch.autocast(self._device.type, dtype=compute, enabled=compute != torch.float32):
            moments: Tensor = self.vae.encode(pixels).latent_dist.parameters
        return moments.float()


def _not_finite(values: Tensor) -> list[int]:
    slots: list[int] = (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return slots
