"""How much a timestep's loss counts, and how the difference to the target is measured."""

from typing import Literal

import torch
from torch import Tensor

from training.dreambooth.sd_models.prediction import PredictionType

Weighting = Literal["none", "min_snr", "debiased", "p2"]
LossKind = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
_DEBIASED_MAX_SNR = 1000.0


def loss_weights(weighting: Weighting, snr: Tensor, prediction: PredictionType, *, gamma: float) -> Tensor:
    """Return (B,) what each sample's loss is multiplied by.

    min_snr: min(SNR, γ) / SNR for ε, / (SNR + 1) for v (Hang et al. 2023, arXiv:2303.09556, in terms of x₀).
    debiased: 1 / √SNR for ε, SNR cut at 1000 (arXiv:2310.08442); 1 / (SNR + 1) for v. p2: (1 + SNR)^-γ.
    """
    is_v = prediction == "v_prediction"
    if weighting == "min_snr":
        return snr.clamp_max(gamma) / (snr + 1 if is_v else snr)
    if weighting == "debiased":
        return 1 / (snr + 1) if is_v else snr.clamp_max(_DEBIASED_MAX_SNR).rsqrt()
    if weighting == "p2":
        return (1 + snr) ** -gamma
    return torch.ones_like(snr)


def differences(kind: LossKind, predicted: Tensor, target: Tensor, *, huber_c: Tensor | None = None) -> Tensor:
    """Return the loss of each value, same shape. huber_c: (B,) where the square turns into a line.

    huber: 2c (√(d² + c²) - c), smooth_l1: 2 (√(d² + c²) - c), the pseudo-Huber forms of kohya's --loss_type: near 0 the
    first is d², the second d² / c.
    """
    difference = predicted - target
    if kind == "l2":
        return difference.square()
    assert huber_c is not None
    c = huber_c.to(difference)[:, None, None, None]
    bent = 2 * ((difference.square() + c.square()).sqrt() - c)
    return c * bent if kind == "huber" else bent


def huber_c(schedule: HuberSchedule, t: Tensor, snr: Tensor, *, smallest: float, num_timesteps: int) -> Tensor:
    """Return (B,) the bend of each sample: constant, falling with t from 1 to `smallest`, or by its noise.

    exponential: smallest^(t/T); snr: (1 - smallest) / (1 + σ)² + smallest with σ = √(1 / SNR).
    """
    if schedule == "exponential":
        return torch.full_like(snr, smallest) ** (t.to(snr) / num_timesteps)
    if schedule == "snr":
        sigma = snr.rsqrt()
        return (1 - smallest) / (1 + sigma) ** 2 + smallest
    return torch.full_like(snr, smallest)
