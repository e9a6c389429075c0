"""Noise of a sample, counted by its identity: plain, with an offset per channel, in several resolutions, perturbed.

Each sample is shaped alone, so that its neighbours in a batch change nothing (kohya scales a whole batch at once).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from training.randomness import SampleIdentity, normal

Array = npt.NDArray[np.float32]
_LEAST_RATIO, _RATIO_SPAN = 2.0, 2.0


def noise_of(
    identity: SampleIdentity,
    shape: tuple[int, int, int],
    *,
    offset: float = 0.0,
    multires_iterations: int = 0,
    multires_discount: float = 0.3,
) -> Tensor:
    """Return the noise of one sample, (C, H, W) float32, which is added and predicted.

    offset: adds offset · n, n ~ N(0, 1) per channel (crosslabs.org, "Diffusion with offset noise"). multires: adds
    noise of ever smaller sizes, enlarged, each times discount^i, and scales the sum to a standard deviation of 1
    (wandb.ai, "Multi-resolution noise for diffusion model training").
    """
    noise = torch.from_numpy(normal(identity, "noise", shape))
    if multires_iterations:
        noise = _in_several_resolutions(identity, noise, multires_iterations, multires_discount)
    if offset:
        noise = noise + offset * torch.from_numpy(normal(identity, "offset noise", (shape[0], 1, 1)))
    return noise


def perturbed(identity: SampleIdentity, noise: Tensor, *, strength: float) -> Tensor:
    """Return the noise that is added when the model's input is perturbed; the target stays the plain one.

    ε + γ ε', Ning et al. 2023 (arXiv:2301.11706).
    """
    if not strength:
        return noise
    return noise + strength * torch.from_numpy(normal(identity, "input perturbation", tuple(noise.shape)))


def _in_several_resolutions(identity: SampleIdentity, noise: Tensor, iterations: int, discount: float) -> Tensor:
    channels, height, width = noise.shape
    total, ratio = noise.clone(), 1.0
    draws = identity.generator("multires ratios").random(iterations)
    for number in range(1, iterations + 1):
        ratio *= _LEAST_RATIO + _RATIO_SPAN * float(draws[number - 1])
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.from_numpy(normal(identity, f"multires noise {number}", (channels, *size)))
        total += discount**number * interpolate(coarse[None], (height, width), mode="bilinear")[0]
        if size == (1, 1):
            break
    return total / total.std()
