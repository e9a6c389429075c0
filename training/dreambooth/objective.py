"""What a step asks of the UNet: timestep, noise and target of each sample, how the difference counts, and the prior.

All randomness is counted by a sample's identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config.dreambooth import NUM_TIMESTEPS, DreamBoothConfig
from training.dreambooth.diffusion.schedule import NoiseSchedule, timestep
from training.dreambooth.diffusion.shaping import noise_of, perturbed
from training.dreambooth.diffusion.weights import differences, huber_c, loss_weights
from training.dreambooth.sd_models.prediction import Prediction
from training.randomness import SampleIdentity, uniform

CLASS_SUFFIX = "/class"
"""Ends the concept of class images: `chisato/class`."""
_GAMMA = {"min_snr": 5.0, "p2": 1.0}


@dataclass(frozen=True)
class Diffused:
    """noised, target: (B, C, h, w); timesteps: (B,) int64 on the CPU; snr: (B,) on the CPU."""

    noised: Tensor
    target: Tensor
    timesteps: Tensor
    snr: Tensor


class Objective:
    """Timesteps, noise, differences and weights as the settings say. num_epochs: of the stage."""

    def __init__(self, settings: DreamBoothConfig, prediction: Prediction, *, num_epochs: int) -> None:
        self._settings, self._prediction, self._num_epochs = settings, prediction, num_epochs
        self._schedule = NoiseSchedule.make(zero_terminal_snr=prediction.zero_terminal_snr)

    def timesteps(self, identities: Sequence[SampleIdentity]) -> Tensor:
        """Return (B,) int64 within the range that is trained."""
        low, high = self._settings.timestep_range
        return torch.tensor([timestep(uniform(one, "timestep"), low=low, high=high) for one in identities])

    def given_timesteps(self, shares: Sequence[float]) -> Tensor:
        """Return (B,) int64 for timesteps from 0 (picture) to 1 (noise)."""
        return torch.tensor([min(round(share * NUM_TIMESTEPS), NUM_TIMESTEPS - 1) for share in shares])

    def diffuse(self, latents: Tensor, t: Tensor, identities: Sequence[SampleIdentity]) -> Diffused:
        """Mix latents (B, C, h, w) with each sample's own noise at timesteps t: (B,)."""
        settings = self._settings
        channels, height, width = latents.shape[1:]
        noises = [
            noise_of(
                one, (channels, height, width), offset=settings.offset_noise,
                multires_iterations=settings.multires_iterations, multires_discount=settings.multires_discount,
            )
            for one in identities
        ]  # fmt: skip
        strength = settings.input_perturbation
        added = [perturbed(one, noise, strength=strength) for one, noise in zip(identities, noises, strict=True)]
        noise, mixed_in = (torch.stack(some).to(latents) for some in (noises, added))
        return Diffused(
            noised=self._schedule.noised(latents, mixed_in, t),
            target=self._schedule.target(self._prediction.kind, latents, noise, t),
            timesteps=t,
            snr=self._schedule.snr(t),
        )

    def differences(self, predicted: Tensor, target: Tensor, diffused: Diffused) -> Tensor:
        """Return the loss of each value, (B, C, h, w)."""
        settings, bend = self._settings, None
        if settings.loss != "l2":
            bend = huber_c(
                settings.huber_schedule, diffused.timesteps, diffused.snr, smallest=settings.huber_c,
                num_timesteps=NUM_TIMESTEPS,
            )  # fmt: skip
        return differences(settings.loss, predicted, target, huber_c=bend)

    def weights(self, diffused: Diffused, identities: Sequence[SampleIdentity]) -> Tensor:
        """Return (B,) what each sample's loss is multiplied by: by its SNR, and a class image's by the prior weight."""
        kind = self._settings.loss_weighting
        gamma = self._settings.loss_gamma or _GAMMA.get(kind, 1.0)
        by_snr = loss_weights(kind, diffused.snr, self._prediction.kind, gamma=gamma)
        return by_snr * torch.tensor([self.prior_weight(one) for one in identities])

    def prior_weight(self, identity: SampleIdentity) -> float:
        """Return a class image's weight in its epoch, on a line from the first to the last; 1 for any other."""
        if not is_class(identity):
            return 1.0
        first = self._settings.prior_weight
        last = first if self._settings.prior_weight_end is None else self._settings.prior_weight_end
        return first + (last - first) * min(identity.epoch / max(self._num_epochs - 1, 1), 1.0)


def is_class(identity: SampleIdentity) -> bool:
    """Tell whether a sample is a class image."""
    return identity.concept.endswith(CLASS_SUFFIX)
