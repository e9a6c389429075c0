"""Settings of a run: the recipe `stage_c`."""

from typing import ClassVar, Literal

from pydantic import Field

from sharding.config import Config
from training.config.watching import Prompt

SAMPLERS = ("ddpm", "ddim")
"""Of previews: the published one, which adds noise at each step, and the same without."""
SIDE_MULTIPLE = 8
"""Sides of a picture: stage B works on patches of 2 × 2 of stage A's latents, each of which is 4 × 4 pixels."""


class StageCConfig(Config):
    """The recipe `stage_c`: Stable Cascade stage C."""

    FREE: ClassVar = frozenset(
        {"network", "text_encoder", "tokenizer", "effnet", "previewer", "preview_shift", "gradient_checkpointing"}
    )

    network: str
    """Weights to start from: a .safetensors file (any layout), a diffusers folder, or a hub id."""
    text_encoder: str
    """CLIP bigG text model: a Hugging Face folder, a hub id, or a bare .safetensors file."""
    tokenizer: str = "builtin"
    """Tokenizer folder or hub id; "builtin" is CLIP's vocabulary as shipped here."""
    effnet: str
    """EfficientNet encoder (.safetensors)."""
    previewer: str | None = None
    """Previewer (.safetensors); without it there are no previews."""
    train_text_encoder: bool = False
    """Train the text encoder together with the network."""
    max_tokens: Literal[75, 150, 225] = 75
    """Of a caption, in windows of 75; what does not fit is cut, and counted in the chart `sample_mean/cut_tokens`."""
    attention_mask: bool = True
    """Mask padding in the text encoder, as diffusers and the official code do; kohya does not."""
    encode_scale: float = Field(0.75, gt=0, le=1)
    """Pixels fed to the encoder per pixel of the picture: official 3/4 (24×24 latents for 1024²), kohya 1 (32×32).
    Buckets are sizes of what the encoder sees; previews follow the same density."""
    loss_weighting: Literal["p2", "adaptive"] = "p2"
    """kohya's default, or 1 / the running loss at a sample's noise level (the official finetunes)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, less memory."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the network's blocks and attention probabilities while training."""
    preview_shift: float = Field(2.0, gt=0)
    """Noise schedule shift when sampling previews."""


def prompt_problems(prompt: Prompt) -> list[str]:
    """Return why stage C cannot draw a preview; empty when it can."""
    problems = []
    if prompt.sampler not in SAMPLERS:
        problems.append(f"sampler {prompt.sampler!r}: the recipe stage_c has {' and '.join(SAMPLERS)}")
    nearest = [
        max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE) for side in (prompt.width, prompt.height)
    ]
    if nearest != [prompt.width, prompt.height]:
        problems.append(
            f"{prompt.width}x{prompt.height}: sides must be multiples of {SIDE_MULTIPLE}; "
            f"the nearest size is {nearest[0]}x{nearest[1]}"
        )
    return problems
