"""What a step of stage C asks of the network: timestep, noise and target of each sample, and its loss weight.

All randomness is counted by a sample's identity.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from training.config.stage_c import StageCConfig
from training.randomness import SampleIdentity, normal, uniform
from training.stage_c.gdf import (
    AdaptiveLossWeight,
    Diffused,
    diffuse,
    min_snr_weight,
    p2_weight,
    timestep_from_uniform,
)


class Objective:
    """Timesteps, noise and weights as the settings say. Holds the adaptive weights' table, which is state."""

    def __init__(self, settings: StageCConfig) -> None:
        self._settings = settings
        self._adaptive = AdaptiveLossWeight() if settings.loss_weighting == "adaptive" else None

    def timesteps(self, identities: Sequence[SampleIdentity]) -> Tensor:
        """Return (B,) float32 within the range that is trained; all of it is [0.001, 1]."""
        low, high = self._settings.timestep_range
        numbers = [uniform(identity, "timestep") for identity in identities]
        return timestep_from_uniform(torch.tensor(numbers, dtype=torch.float32), low=low, high=high)

    def diffuse(self, latents: Tensor, t: Tensor, identities: Sequence[SampleIdentity]) -> Diffused:
        """Mix latents (B, C, H, W) with each sample's own noise at timesteps t: (B,); the noise is the target.

        With offset noise, a number per channel is part of the noise, and so of the target.
        """
        num_channels, *size = latents.shape[1:]
        noise = np.stack([normal(identity, "noise", (num_channels, *size)) for identity in identities])
        if strength := self._settings.offset_noise:
            offsets = [normal(identity, "offset noise", (num_channels, 1, 1)) for identity in identities]
            noise += np.float32(strength) * np.stack(offsets)
        on_device = torch.from_numpy(noise).to(latents.device)
        return diffuse(latents, t.to(latents.device), on_device, shift=self._settings.shift)

    def weights(self, logsnr: Tensor) -> Tensor:
        """Return (B,) what each sample's loss is multiplied by."""
        settings = self._settings
        if self._adaptive is not None:
            return self._adaptive.weight(logsnr)
        if settings.loss_weighting == "p2":
            return p2_weight(logsnr, shift=settings.loss_shift)
        if settings.loss_weighting == "min_snr":
            return min_snr_weight(logsnr, gamma=settings.min_snr_gamma, shift=settings.loss_shift)
        return torch.ones_like(logsnr)

    def after_step(self, logsnr: Sequence[float], losses: Sequence[float]) -> None:
        """Take note of a whole step's unweighted losses, in plan order."""
        if self._adaptive is not None and losses:
            self._adaptive.update(torch.tensor(logsnr), torch.tensor(losses))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the table of adaptive weights; nothing without them."""
        return {} if self._adaptive is None else self._adaptive.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        if self._adaptive is not None:
            self._adaptive.load_state_dict(tensors)
