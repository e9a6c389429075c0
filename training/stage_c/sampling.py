"""Previews of stage C: prompt → latents → the previewer's small picture. Sizes follow the density of training."""

import math

import torch
from PIL import Image
from torch import Tensor

from training.config import Prompt
from training.config.stage_c import StageCConfig
from training.randomness import SampleIdentity, normal
from training.stage_c.conditioning import Conditioning
from training.stage_c.effnet import PIXELS_PER_LATENT
from training.stage_c.gdf import sample
from training.stage_c.network import StageCNetwork
from training.stage_c.previewer import Previewer


@torch.no_grad()
def draw_latents(
    prompt: Prompt, *, network: StageCNetwork, conditioning: Conditioning, settings: StageCConfig
) -> Tensor:
    """Return the latents (1, 16, H, W) of a prompt, with noise counted by its seed.

    The network must be in eval mode. A prompt is sampled alone: a picture does not depend on its neighbours.
    """
    identity = SampleIdentity(seed=prompt.seed, epoch=0, chunk="preview", key=f"{prompt.width}x{prompt.height}")
    height, width = (latent_side(side, settings.encode_scale) for side in (prompt.height, prompt.width))
    windows = conditioning.tokens([prompt.text, prompt.negative]).windows
    text, pooled = conditioning.states(windows)

    def predict(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        both = network(x.repeat(2, 1, 1, 1), r.repeat(2), text, pooled)
        return both[:1], both[1:]

    def noise(step: int) -> Tensor:
        return torch.from_numpy(normal(identity, f"noise {step}", (1, 16, height, width))).to(windows.device)

    return sample(
        predict, noise, num_steps=prompt.steps, shift=settings.preview_shift, cfg=prompt.guidance,
        eta=1.0 if prompt.sampler == "ddpm" else 0.0,
    )  # fmt: skip


def picture(latents: Tensor, previewer: Previewer) -> Image.Image:
    """Return what the previewer makes of latents (1, 16, H, W): (8 W, 8 H) pixels."""
    pixels = (previewer(latents)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels)


def latent_side(pixels: int, encode_scale: float) -> int:
    """Return the latent's side for a picture's side: ceil(pixels × scale / 32); 1024 is 24 at 3/4 and 32 at 1."""
    return math.ceil(round(pixels * encode_scale / PIXELS_PER_LATENT, 6))
