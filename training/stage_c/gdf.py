"""Diffusion of stage C: noise schedule, forward process, loss weights and the preview sampler.

The arithmetic of the published GDF(cosine schedule clamped to [1e-4, 0.9999], variance preserving scaler, epsilon
target). No function here draws random numbers: uniform numbers and noise are passed in. Knows nothing about networks,
conditioning or batches.

Sources: Nichol and Dhariwal, "Improved DDPM", 2021, eq. 17 (cosine schedule); Choi et al., "Perception Prioritized
Training", 2022, eq. 8 (P2 weights); Pernias et al., "Würstchen", 2023; Lin et al., "Common Diffusion Noise Schedules",
2023, section 3.4 (rescaled guidance).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COSINE_OFFSET = 0.008
ALPHA_BAR_MIN, ALPHA_BAR_MAX = 1e-4, 0.9999
ALPHA_BAR_START = math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
LOGSNR_LIMIT = math.log(ALPHA_BAR_MAX / ALPHA_BAR_MIN)  # 9.21024, symmetric
TIMESTEP_SHIFT = 0.001


def timestep_from_uniform(uniform: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Turn uniform numbers in [0, 1) into training timesteps in [0.001, 1], same shape and dtype.

    t = 1 gets a probability of 0.001: the published draw adds 0.001 and clamps. low, high: that range is stretched to
    this one.
    """
    return low + (high - low) * ((1 - uniform) + TIMESTEP_SHIFT).clamp(TIMESTEP_SHIFT, 1.0)


def logsnr_from_timestep(t: Tensor, *, shift: float = 1.0) -> Tensor:
    """Return the log signal-to-noise ratio at t: (B,) in [0, 1], float32, clamped to +-LOGSNR_LIMIT.

    shift: 2 means as much noise as a picture twice as wide would need; training uses 1, published sampling 2.
    Computed in float64: 1 - alpha_bar at the clamp keeps four digits in float32.
    """
    angle = (COSINE_OFFSET + t.double()) / (1 + COSINE_OFFSET) * (math.pi / 2)
    alpha_bar = (angle.cos().clamp(0, 1) ** 2 / ALPHA_BAR_START).clamp(ALPHA_BAR_MIN, ALPHA_BAR_MAX)
    logsnr = torch.log(alpha_bar / (1 - alpha_bar)) + 2 * math.log(1 / shift)
    return logsnr.clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT).float()


def noise_level(logsnr: Tensor) -> Tensor:
    """Return r: (B,) float32, the number the network is given: the timestep whose clamped logSNR this is.

    r stays in [0.00226, 0.99358]; t itself is never fed to the network.
    """
    alpha_bar = (torch.sigmoid(logsnr.double()) * ALPHA_BAR_START).clamp(0, 1)
    return (alpha_bar.sqrt().acos() / (math.pi / 2) * (1 + COSINE_OFFSET) - COSINE_OFFSET).float()


def signal_and_noise_scale(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, b) float32 with a^2 + b^2 = 1: noised = a * latents + b * noise."""
    logsnr = logsnr.double()
    return torch.sigmoid(logsnr).sqrt().float(), torch.sigmoid(-logsnr).sqrt().float()


@dataclass(frozen=True)
class Diffused:
    """What a training forward needs: noised and target (B, C, H, W), r and logsnr (B,), all float32."""

    noised: Tensor
    target: Tensor
    r: Tensor
    logsnr: Tensor


def diffuse(latents: Tensor, t: Tensor, noise: Tensor, *, shift: float = 1.0) -> Diffused:
    """Mix latents (B, C, H, W) with noise of the same shape at timesteps t: (B,).

    Raises ValueError if the shapes do not fit.
    """
    if noise.shape != latents.shape or t.shape != latents.shape[:1]:
        raise ValueError(
            f"diffuse: latents {tuple(latents.shape)}, noise {tuple(noise.shape)} and t {tuple(t.shape)} do not fit; "
            "noise must have the latents' shape and t one entry per sample"
        )
    logsnr = logsnr_from_timestep(t, shift=shift).to(latents.device)
    a, b = (scale[:, None, None, None] for scale in signal_and_noise_scale(logsnr))
    noise = noise.float()
    return Diffused(noised=a * latents.float() + b * noise, target=noise, r=noise_level(logsnr), logsnr=logsnr)


def p2_weight(logsnr: Tensor, *, k: float = 1.0, gamma: float = 1.0, scale: float = 1.0, shift: float = 1.0) -> Tensor:
    """Return (k + exp(scale * logSNR))^-gamma: (B,); with the defaults b^2, whose mean over training draws is 0.5055.

    shift moves the logSNR seen by the weight only.
    """
    return (k + (scale * (logsnr + 2 * math.log(shift))).exp()) ** -gamma


def min_snr_weight(logsnr: Tensor, *, gamma: float = 5.0, shift: float = 1.0) -> Tensor:
    """Return min(SNR, gamma) / SNR: (B,), the weights for a network that predicts the noise.

    shift moves the logSNR seen by the weight only. GDF's class of the same name gives min(SNR, gamma), which is meant
    for a network that predicts the picture: on predicted noise it favours little noise by far.
    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, section 3.4.
    """
    snr = (logsnr + 2 * math.log(shift)).exp()
    return snr.clamp(max=gamma) / snr


class AdaptiveLossWeight:
    """Weight a sample by 1 / the running loss at its logSNR.

    A table of 300 running losses (float64, CPU), starting at 1. The owner must save it with the state and carry it
    across chunks: 8,000 images move it only 41 % of the way from its start. Update it once a step with the losses of
    all ranks in plan order, so that every rank holds the same table whatever their number.
    """

    NUM_BUCKETS = 300
    MOMENTUM = 0.99
    MIN_WEIGHT, MAX_WEIGHT = 1e-7, 1e7

    def __init__(self) -> None:
        self._edges = torch.linspace(-10, 10, self.NUM_BUCKETS - 1)
        self._losses = torch.ones(self.NUM_BUCKETS, dtype=torch.float64)

    def bucket(self, logsnr: Tensor) -> Tensor:
        """Return the table index of each logSNR: (B,) int64 on the CPU; training reaches 12 to 287."""
        return torch.searchsorted(self._edges, logsnr.detach().float().cpu().contiguous())

    def weight(self, logsnr: Tensor) -> Tensor:
        """Return the weights: (B,) float32 on logsnr's device."""
        weights = (1 / self._losses[self.bucket(logsnr)]).clamp(self.MIN_WEIGHT, self.MAX_WEIGHT)
        return weights.float().to(logsnr.device)

    def update(self, logsnr: Tensor, loss: Tensor) -> None:
        """Fold in unweighted per-sample losses (N,), in plan order, as if one after the other.

        Exact when a bucket occurs m times: 0.99^m * old + sum over j of 0.01 * 0.99^(m - j) * loss_j.
        Raises ValueError if shapes differ or a loss is not finite, which would poison the table for good.
        """
        loss = loss.detach().double().cpu()
        if loss.ndim != 1 or loss.shape != logsnr.shape:
            raise ValueError(f"adaptive weight: logsnr {tuple(logsnr.shape)} and loss {tuple(loss.shape)} must be (N,)")
        if not torch.isfinite(loss).all():
            raise ValueError("adaptive weight: a loss is not finite; leave skipped samples out of the update")
        buckets, order = self.bucket(logsnr).sort(stable=True)
        counts = buckets.bincount(minlength=self.NUM_BUCKETS)
        ends = counts.cumsum(0)
        later = ends[buckets] - 1 - torch.arange(len(buckets))  # samples of the same bucket that come after this one
        self._losses *= self.MOMENTUM ** counts.double()
        self._losses.index_add_(0, buckets, (1 - self.MOMENTUM) * self.MOMENTUM ** later.double() * loss[order])

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the table."""
        return {"losses": self._losses.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the table. Raises ValueError if it is not 300 finite numbers."""
        losses = state.get("losses")
        if losses is None or losses.shape != (self.NUM_BUCKETS,) or not torch.isfinite(losses).all():
            raise ValueError(
                f"adaptive weight: state must hold 'losses', {self.NUM_BUCKETS} finite numbers; got keys {list(state)}"
            )
        self._losses = losses.detach().double().cpu().clone()


def guide(conditional: Tensor, unconditional: Tensor, *, cfg: float, cfg_rho: float) -> Tensor:
    """Combine two predictions (B, C, H, W) by classifier-free guidance with rescaled spread.

    The standard deviations are taken PER SAMPLE, so that a preview does not depend on which prompts share its batch;
    the published sampler takes them over the whole batch and agrees only for a batch of one.
    """
    guided = torch.lerp(unconditional, conditional, cfg)
    if cfg_rho == 0:
        return guided
    spread = conditional.std(dim=(1, 2, 3), keepdim=True) / (guided.std(dim=(1, 2, 3), keepdim=True) + 1e-9)
    return guided * (cfg_rho * spread + (1 - cfg_rho))


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    noise: Callable[[int], Tensor],
    *,
    num_steps: int = 20,
    shift: float = 2.0,
    cfg: float = 4.0,
    cfg_rho: float = 0.7,
    eta: float = 1.0,
) -> Tensor:
    """Draw latents (B, C, H, W) float32 with the ancestral DDPM sampler; with eta = 0 it is DDIM, which adds no noise.

    predict(x, r) returns the conditional and the unconditional noise prediction, the latter None for no guidance;
    x: (B, C, H, W) float32, r: (B,) float32. noise(step): (B, C, H, W) standard normal; step 0 is the start, steps
    1 to num_steps - 1 are added on the way. Asked for exactly once each, in order.

    Returns the last estimate of the clean latents, not the last x.
    Raises ValueError if num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"sample: num_steps must be at least 1, got {num_steps}")
    x = noise(0).float()
    ladder = logsnr_from_timestep(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift=shift).to(x.device)
    clean = x
    for step in range(num_steps):
        r = noise_level(ladder[step]).expand(x.shape[0])
        conditional, unconditional = predict(x, r)
        epsilon = conditional.float()
        if unconditional is not None:
            epsilon = guide(epsilon, unconditional.float(), cfg=cfg, cfg_rho=cfg_rho)
        a, b = signal_and_noise_scale(ladder[step])
        clean = (x - b * epsilon) / a
        if step + 1 < num_steps:
            a_next, b_next = signal_and_noise_scale(ladder[step + 1])
            sigma = eta * b_next / b * (1 - (a / a_next) ** 2).clamp_min(0).sqrt()
            x = a_next * clean + (b_next**2 - sigma**2).clamp_min(0).sqrt() * epsilon + sigma * noise(step + 1).float()
    return clean
