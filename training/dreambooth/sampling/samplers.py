"""Samplers by the names of A1111's web UI, as diffusers' schedulers.

The table is the web UI's: DDIM takes the timesteps 1, 1 + n, … ("leading"), the k-diffusion ones reach from the last
timestep to the first ("linspace"); all with SD's own noise schedule. A model trained to zero terminal SNR starts from
pure noise, so every sampler then starts at the last timestep ("trailing": Lin et al. 2024, arXiv:2305.08891, table 2).
"""

from collections.abc import Mapping
from typing import Any

import torch

from training.config.dreambooth import SAMPLERS, SamplerName
from training.dreambooth.sd_models.prediction import Prediction

MAX_STEPS = 999
"""The schedule has 1,000 timesteps, and DDIM passes over the one nearest to the picture."""
GUIDANCE_RESCALE = 0.7
"""φ of guidance towards a zero-terminal-SNR schedule (Lin et al. 2024, section 3.4)."""
_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
_LINSPACE = {"timestep_spacing": "linspace"}
_TABLE: Mapping[SamplerName, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {**_LEADING, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", _LEADING),
    "euler": ("EulerDiscreteScheduler", _LINSPACE),
    "euler_a": ("EulerAncestralDiscreteScheduler", _LINSPACE),
    "dpm++_2m": ("DPMSolverMultistepScheduler", _LINSPACE),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {**_LINSPACE, "use_karras_sigmas": True}),
}


def make_scheduler(sampler: str, *, steps: int, prediction: Prediction) -> Any:
    """Return a diffusers scheduler that is set to `steps` timesteps, on the CPU.

    Raises ValueError for a name that is not in SAMPLERS, and for more than MAX_STEPS.
    """
    import diffusers

    known = next((name for name in SAMPLERS if name == sampler), None)
    if known is None:
        raise ValueError(f"sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} sampling steps: must be 1 to {MAX_STEPS}")
    class_name, settings = _TABLE[known]
    if prediction.zero_terminal_snr:
        settings = {**settings, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = getattr(diffusers, class_name)(**_SCHEDULE, **settings, prediction_type=prediction.kind)
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) > steps:
        _drop_last(scheduler, steps)
    if hasattr(scheduler, "set_begin_index"):
        # Without it the first step is looked up by its timestep, and a doubled one (Karras) would skip a sigma.
        scheduler.set_begin_index(0)
    return scheduler


def _drop_last(scheduler: Any, steps: int) -> None:
    """Take off what diffusers' trailing spacing has too much for 61, 103, … steps: a timestep -1, of pure noise."""
    scheduler.timesteps = scheduler.timesteps[:steps]
    scheduler.num_inference_steps = steps
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
