"""What a step of stage C asks of the network: timestep, noise and target of each sample, and its loss weight.

All randomness is counted by a sample's identity.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from training.config.stage_c import StageCConfig
from training.randomness import SampleIdentity, normal, uniform
from training.stage_c.gdf import AdaptiveLossWeight, Diffused, diffuse, p2_weight, timestep_from_uniform


class Objective:
    """Timesteps, noise and weights as the settings say. Holds the adaptive weights' table, which is state."""

    def __init__(self, settings: StageCConfig) -> None:
        self._adaptive = AdaptiveLossWeight() if settings.loss_weighting == "adaptive" else None

    def timesteps(self, identities: Sequence[SampleIdentity]) -> Tensor:
        """Return (B,) float32 in [0.001, 1]."""
        numbers = [uniform(identity, "timestep") for identity in identities]
        return timestep_from_uniform(torch.tensor(numbers, dtype=torch.float32))

    def diffuse(self, latents: Tensor, t: Tensor, identities: Sequence[SampleIdentity]) -> Diffused:
        """Mix latents (B, C, H, W) with each sample's own noise at timesteps t: (B,)."""
        shape = tuple(latents.shape[1:])
        noise = torch.from_numpy(np.stack([normal(identity, "noise", shape) for identity in identities]))
        return diffuse(latents, t.to(latents.device), noise.to(latents.device))

    def weights(self, logsnr: Tensor) -> Tensor:
        """Return (B,) what each sample's loss is multiplied by."""
        return p2_weight(logsnr) if self._adaptive is None else self._adaptive.weight(logsnr)

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
