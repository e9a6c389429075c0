"""Stable Diffusion's noise schedule: how much noise at which of 1,000 timesteps, and what the model has to predict.

x_t = a z + b ε with a = √ᾱ_t, b = √(1 - ᾱ_t). β rises from 0.00085 to 0.012, linearly in its root ("scaled linear").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.config.dreambooth import NUM_TIMESTEPS
from training.dreambooth.sd_models.prediction import PredictionType

_BETA_FIRST, _BETA_LAST = 0.00085, 0.012


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: ᾱ, (1000,) float32 on the CPU; [0] is nearly the picture, [999] nearly or wholly noise."""

    alphas_cumprod: Tensor

    @classmethod
    def make(cls, *, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """Return SD's schedule; zero terminal SNR as in Lin et al. 2024 (arXiv:2305.08891, algorithm 1)."""
        betas = torch.linspace(_BETA_FIRST**0.5, _BETA_LAST**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
        signal = torch.cumprod(1 - betas, dim=0).sqrt()
        if zero_terminal_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        return cls((signal**2).float())

    def snr(self, t: Tensor) -> Tensor:
        """Return ᾱ / (1 - ᾱ) of each timestep; 0 at the end of a schedule rescaled to zero."""
        alphas = self.alphas_cumprod[t.cpu()]
        return alphas / (1 - alphas)

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return a z + b ε. latents, noise: (B, C, H, W); t: (B,) int64."""
        signal, spread = self._scales(t, latents)
        return signal * latents + spread * noise

    def target(self, kind: PredictionType, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the model has to predict: ε, or v = a ε - b z."""
        if kind == "epsilon":
            return noise
        signal, spread = self._scales(t, latents)
        return signal * noise - spread * latents

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[t.cpu()].to(like.device, like.dtype)[:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()


def timestep(number: float, *, low: float = 0.0, high: float = 1.0) -> int:
    """Return the timestep for a uniform number in [0, 1), within the range [low, high) of all of them.

    low, high: as shares, 0 the picture and 1 noise. Each timestep of the range is equally likely.
    """
    first, end = round(low * NUM_TIMESTEPS), round(high * NUM_TIMESTEPS)
    return first + int(number * (end - first))
