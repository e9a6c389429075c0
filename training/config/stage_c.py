"""Settings of a run: the recipe `stage_c`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sharding.config import Config
from training.config.watching import Prompt

SAMPLERS = ("ddpm", "ddim")
"""Of previews: the published one, which adds noise at each step, and the same without."""
SIDE_MULTIPLE = 8
"""Sides of a picture: stage B works on patches of 2 × 2 of stage A's latents, each of which is 4 × 4 pixels."""


class StageCConfig(Config):
    """The recipe `stage_c`: Stable Cascade stage C."""

    FREE: ClassVar = frozenset(
        {
            "network", "text_encoder", "tokenizer", "effnet", "previewer", "image_encoder", "preview_shift",
            "gradient_checkpointing",
        }
    )  # fmt: skip

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
    effnet_dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute format of the encoder. Latents that come out of bf16 not finite are made again in fp32; a picture whose
    latents are not finite in fp32 either is left out as broken."""
    image_embedding_fraction: float = Field(0.0, ge=0, le=1)
    """Share of exposures whose CLIP image embedding is shown to the network, by counted randomness; the others, and all
    previews, show it zeros. Officially 0.1; kohya 0, which freezes clip_img_mapper.weight: its gradient would be 0."""
    image_encoder: str | None = None
    """CLIP ViT-L/14 image model, for image_embedding_fraction: a Hugging Face folder, a hub id, or a bare file."""
    loss_weighting: Literal["p2", "adaptive", "min_snr", "none"] = "p2"
    """Of a sample, by its SNR = exp(logSNR): 1 / (1 + SNR) (kohya's default) · 1 / the running loss at its noise level
    (the official finetunes) · min(SNR, min_snr_gamma) / SNR · 1."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Of `min_snr`: below this SNR all samples count the same."""
    loss_shift: float = Field(1.0, gt=0)
    """Adds 2 ln(loss_shift) to the logSNR that `p2` and `min_snr` see."""
    timestep_range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Train noise levels between these timesteps only; 0 is the picture, 1 is noise. kohya's steps are thousandths."""
    shift: float = Field(1.0, gt=0)
    """Noise schedule shift while training: 2 trains with as much noise as a picture twice as wide would need."""
    offset_noise: float = Field(0.0, ge=0)
    """Strength of noise that is the same all over a latent channel, added to the noise; officially 0."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, less memory."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the network's blocks and attention while training."""
    attention_dropout: Literal["probabilities", "output", "none"] = "probabilities"
    """What of attention `dropout` acts on: its probabilities (the official code, kohya with --sdpa), its output
    (diffusers), or nothing (kohya with --xformers, or with neither)."""
    preview_shift: float = Field(2.0, gt=0)
    """Noise schedule shift when sampling previews."""

    # --- what every recipe's table answers ---

    side_multiple: ClassVar[int] = 32
    """Sides of a bucket: pixels that the image encoder makes one latent position of."""
    latent_channels: ClassVar[int] = 16
    """Of a latent that is stored ahead."""
    text_key: ClassVar[str] = "stage_c.train_text_encoder"
    """The key that says whether a text encoder is trained."""

    @property
    def can_preview(self) -> bool:
        """Whether pictures can be drawn."""
        return self.previewer is not None

    def prompt_problems(self, prompt: Prompt) -> list[str]:
        """Return why stage C cannot draw a preview; empty when it can."""
        return prompt_problems(prompt)

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "StageCConfig":
        if (self.image_embedding_fraction > 0) != (self.image_encoder is not None):
            raise ValueError(
                f"image_embedding_fraction is {self.image_embedding_fraction:g} and image_encoder is "
                f"{self.image_encoder!r}: set both, or neither"
            )
        low, high = self.timestep_range
        if low >= high:
            raise ValueError(f"timestep_range [{low:g}, {high:g}]: the first must be smaller, such as [0.2, 1]")
        readers = {"min_snr_gamma": ("min_snr",), "loss_shift": ("p2", "min_snr")}
        for option, weightings in readers.items():
            is_default = getattr(self, option) == type(self).model_fields[option].default
            if not is_default and self.loss_weighting not in weightings:
                raise ValueError(
                    f"{option} {getattr(self, option):g} means nothing with loss_weighting {self.loss_weighting!r}, "
                    f"only with {' and '.join(weightings)}"
                )
        return self


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
