"""Previews of stage C: prompt → latents → the previewer's small picture.

Token windows, attention mask and latent density are those of training, unless a prompt says otherwise.
"""

import torch
from PIL import Image
from torch import Tensor

from training.config import Prompt
from training.config.stage_c import StageCConfig
from training.latent_sizes import latent_side
from training.randomness import SampleIdentity, normal
from training.stage_c.conditioning import Conditioning
from training.stage_c.gdf import sample
from training.stage_c.network import StageCNetwork
from training.stage_c.previewer import Previewer


@torch.no_grad()
def draw_latents(
    prompt: Prompt, *, network: StageCNetwork, conditioning: Conditioning, settings: StageCConfig
) -> Tensor:
    """Return the latents (1, 16, H, W) of a prompt, with noise counted by its seed.

    The network must be in eval mode. A prompt is sampled alone: a picture does not depend on its neighbours. Guidance
    goes away from the encoded negative prompt, which is the empty caption by default, not from zeros.
    """
    identity = SampleIdentity(seed=prompt.seed, epoch=0, chunk="preview", key=f"{prompt.width}x{prompt.height}")
    scale = prompt.encode_scale or settings.encode_scale
    height, width = (latent_side(side, scale) for side in (prompt.height, prompt.width))
    windows = conditioning.tokens([prompt.text, prompt.negative], max_tokens=prompt.max_tokens).windows
    text, pooled = conditioning.states(windows, attention_mask=prompt.attention_mask)

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
