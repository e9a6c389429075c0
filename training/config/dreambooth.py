"""Settings of a run: the recipe `dreambooth`, for Stable Diffusion 1, 2 and XL."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sharding.config import Config, Name
from training.config.watching import Prompt

SamplerName = Literal["ddim", "ddpm", "euler", "euler_a", "dpm++_2m", "dpm++_2m_karras"]
SAMPLERS: tuple[SamplerName, ...] = ("ddim", "ddpm", "euler", "euler_a", "dpm++_2m", "dpm++_2m_karras")
"""Of previews and class images, as A1111 names them."""
SIDE_MULTIPLE = 8
"""Sides of a picture and of a bucket: pixels that the VAE makes one latent position of."""
NUM_TIMESTEPS = 1000
"""Of the noise schedule."""
PartName = Literal["unet", "text_encoder", "text_encoder_2"]
TEXT_PARTS: tuple[PartName, ...] = ("text_encoder", "text_encoder_2")
Rate = Annotated[float, Field(gt=0)]


class StageConfig(Config):
    """A part of a run with values of its own; what is left out is the run's."""

    name: Name
    """Shown in charts; the stage's chunk is `concepts/NN-NAME`."""
    epochs: int = Field(gt=0)
    """Passes over its concepts; the wiki's steps per image."""
    train: tuple[PartName, ...] | None = None
    """Parts that are trained; the others stay as the stage before left them."""
    learning_rate: Rate | None = None
    """Peak rate of the UNet."""
    text_encoder_learning_rate: Rate | None = None
    """Peak rate of the text encoder; with SDXL, of the first one."""
    text_encoder_2_learning_rate: Rate | None = None
    """Peak rate of SDXL's second text encoder."""
    concepts: tuple[str, ...] = ()
    """Names of those that are shown; default: all."""
    prior_weight: float | None = Field(None, ge=0)
    """Weight of class images at the stage's start."""
    prior_weight_end: float | None = Field(None, ge=0)
    """Weight of class images in the stage's last epoch."""
    optimizer: Literal["keep", "fresh"] = "keep"
    """keep: moments of parts that the stage before trained, too, go on; fresh: all start at zero."""


class DreamBoothConfig(Config):
    """The recipe `dreambooth`: Stable Diffusion 1, 2 or XL, on packed concepts or any other chunks."""

    FREE: ClassVar = frozenset(
        {
            "model", "vae", "tokenizer", "concepts", "gradient_checkpointing", "attention", "sanity_prompt",
            "sanity_negative", "sanity_seed",
        }
    )  # fmt: skip

    model: str
    """What training starts from: a single file (.safetensors, .ckpt), a diffusers folder, or a hub id."""
    weights: Literal["plain", "ema"] = "plain"
    """Of a file that holds both, the trained weights or their running average."""
    vae: str | None = None
    """Another VAE: a file, a folder or a hub id; "sdxl-fp16-fix" is the one of that name. Default: the model's own."""
    vae_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute format of the VAE's encoder. Latents that come out not finite are made again in fp32."""
    latent_draw: Literal["sample", "mean"] = "sample"
    """A latent is drawn from what the VAE gives anew at each exposure, by counted randomness, or is its mean."""
    tokenizer: str = "builtin"
    """Tokenizer folder or hub id; "builtin" is CLIP's vocabulary as shipped here."""
    concepts: Path | None = None
    """File of `[[concepts]]`, which `python -m training pack-concepts` packs into `concepts/*`."""
    train: tuple[PartName, ...] = Field(("unet",), min_length=1)
    """What is trained, whole: all layers of each part ("unfreeze"). With [lora], parts that get adapters."""
    text_encoder_ratio: float = Field(1.0, ge=0, le=1)
    """Share of the epochs, the first ones, in which text encoders named in `train` are trained; afterwards nothing of
    them is, and their gradients and moments take no memory. The wiki's "step ratio of text encoder training"."""
    text_encoder_2_learning_rate: Rate | None = None
    """Peak rate of SDXL's second text encoder; default: the first one's."""
    freeze_clip_norms: bool = False
    """Keep scales and shifts of the text encoders' layer norms as they are."""
    clip_skip: int = Field(1, ge=1, le=12)
    """Which text layer is read, as A1111 and kohya count: 1 is the last, 2 the one before. SDXL always has its own."""
    max_tokens: Literal[75, 150, 225] = 75
    """Of a caption, in windows of 75; what does not fit is cut, and counted in the chart `sample_mean/cut_tokens`."""
    strict_tokens: bool = False
    """Never cut inside a tag: one that does not fit into a window whole goes into the next, or is left out."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts; auto reads it from the model."""
    zero_terminal_snr: bool | None = None
    """Noise schedule that ends in pure noise; default: as the model is marked. Needs v_prediction."""
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    """How the difference is measured."""
    huber_c: float = Field(0.1, gt=0, le=1)
    """Of `huber` and `smooth_l1`: where the square turns into a line; of a schedule, its smallest value."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """Whether the bend moves with the noise level."""
    loss_weighting: Literal["none", "min_snr", "debiased", "p2"] = "none"
    """Of a sample, by its SNR."""
    loss_gamma: float | None = Field(None, gt=0)
    """γ of `min_snr` (default 5) and `p2` (default 1)."""
    offset_noise: float = Field(0.0, ge=0)
    """Strength of noise that is the same all over a latent channel."""
    multires_iterations: int = Field(0, ge=0, le=10)
    """Coarser noises added to the noise; 0 adds none."""
    multires_discount: float = Field(0.3, gt=0, lt=1)
    """Strength of each compared with the one before."""
    input_perturbation: float = Field(0.0, ge=0)
    """Strength of noise that is added to the input and not predicted."""
    timestep_range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Train noise levels between these timesteps only; 0 is the picture, 1 is noise."""
    prior_weight: float = Field(0.75, ge=0)
    """Weight of each class image's loss; the step's loss is the mean over all of its images (1/N) Σ w L."""
    prior_weight_end: float | None = Field(None, ge=0)
    """Class images' weight falls or rises to this in equal parts, from the first epoch to the last of a stage."""
    prior_target: Literal["noise", "base_model"] = "noise"
    """What class images teach: to predict the noise, or what the model predicted before it was trained."""
    attention: Literal["sdpa", "xformers", "sliced"] = "sdpa"
    """Attention of the UNet: torch's own (memory-efficient), xformers', or a slice at a time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, less memory."""
    sanity_prompt: str = ""
    """A prompt with nothing of the concepts in it, drawn as a preview, too: how far it drifts from the start is
    charted."""
    sanity_negative: str = ""
    """Its negative prompt."""
    sanity_seed: int = Field(420420, ge=0)
    """Its seed."""
    stages: tuple[StageConfig, ...] = ()
    """Tables: parts of the run, one after the other, each with its own chunk."""

    # --- what every recipe's table answers ---

    encode_scale: ClassVar[float] = 1.0
    side_multiple: ClassVar[int] = SIDE_MULTIPLE
    latent_channels: ClassVar[int] = 8
    """Of what is stored ahead: mean and logarithm of the variance, 4 each."""
    text_key: ClassVar[str] = "dreambooth.train"
    can_preview: ClassVar[bool] = True

    @property
    def trained_text(self) -> tuple[PartName, ...]:
        """Text encoders among the parts that are trained, in any stage."""
        named = {*self.train, *(part for stage in self.stages for part in stage.train or ())}
        return tuple(part for part in TEXT_PARTS if part in named)

    @property
    def train_text_encoder(self) -> bool:
        """Whether a text encoder is trained."""
        return bool(self.trained_text)

    def prompt_problems(self, prompt: Prompt) -> list[str]:
        """Return why Stable Diffusion cannot draw a preview; empty when it can."""
        return prompt_problems(prompt)

    @model_validator(mode="before")
    @classmethod
    def _ratio_zero_trains_no_text(cls, values: Any) -> Any:
        """Take text encoders out of `train` where they are never trained, so that no state holds them."""
        if isinstance(values, dict) and values.get("text_encoder_ratio") == 0 and not values.get("stages"):
            train = [part for part in values.get("train", ["unet"]) if part not in TEXT_PARTS]
            others = {key: value for key, value in values.items() if key != "text_encoder_ratio"}
            return {**others, "train": train} if train else values
        return values

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "DreamBoothConfig":
        low, high = self.timestep_range
        if round(low * NUM_TIMESTEPS) >= round(high * NUM_TIMESTEPS):
            raise ValueError(
                f"timestep_range [{low:g}, {high:g}]: none of the {NUM_TIMESTEPS:,} timesteps lies there; the first "
                "must be smaller, such as [0.2, 1]"
            )
        readers = {
            "huber_c": self.loss != "l2",
            "huber_schedule": self.loss != "l2",
            "loss_gamma": self.loss_weighting in ("min_snr", "p2"),
            "multires_discount": self.multires_iterations > 0,
            "text_encoder_ratio": bool(self.trained_text) and self.concepts is not None and not self.stages,
            "text_encoder_2_learning_rate": "text_encoder_2" in self.trained_text,
            "freeze_clip_norms": bool(self.trained_text),
            "stages": self.concepts is not None,
        }
        for option, is_read in readers.items():
            if not is_read and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} {getattr(self, option)!r} would not be read: {_UNREAD[option]}")
        if self.text_encoder_ratio < 1 and "unet" not in self.train:
            raise ValueError(
                f"text_encoder_ratio {self.text_encoder_ratio:g}: `train` names text encoders only, so nothing would "
                "be trained in the other epochs; add unet, or train fewer epochs"
            )
        return self

    @model_validator(mode="after")
    def _stages_are_read(self) -> "DreamBoothConfig":
        for stage in self.stages:
            text = [part for part in stage.train or self.train if part in TEXT_PARTS]
            if stage.text_encoder_learning_rate is not None and not text:
                raise ValueError(f"stages: {stage.name!r} has a text_encoder_learning_rate, but trains no text encoder")
            if stage.text_encoder_2_learning_rate is not None and "text_encoder_2" not in text:
                raise ValueError(
                    f"stages: {stage.name!r} has a text_encoder_2_learning_rate, but does not train text_encoder_2"
                )
        names = [stage.name for stage in self.stages]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"stages: two are named {doubled!r}")
        return self

    @model_validator(mode="after")
    def _pure_noise_teaches_v(self) -> "DreamBoothConfig":
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction v_prediction: pure noise says nothing about epsilon")
        return self

    def epochs_with_text(self, epochs: int) -> int:
        """Return how many of a run's epochs, its first ones, train the text encoders that `train` names."""
        return round(epochs * self.text_encoder_ratio) if self.trained_text else 0


def ratio_problems(recipe: DreamBoothConfig, *, epochs: int) -> list[str]:
    """Return why text_encoder_ratio cannot be kept in so many epochs; empty when it can."""
    if not recipe.trained_text or recipe.stages or recipe.epochs_with_text(epochs):
        return []
    return [
        f"dreambooth.text_encoder_ratio {recipe.text_encoder_ratio:g} of data.epochs {epochs} is not one whole epoch: "
        f"set it to 0, or to {1 / epochs:.2g} and more"
    ]


_UNREAD = {
    "huber_c": 'loss is "l2"; set "huber" or "smooth_l1"',
    "huber_schedule": 'loss is "l2"; set "huber" or "smooth_l1"',
    "loss_gamma": 'loss_weighting must be "min_snr" or "p2"',
    "multires_discount": "multires_iterations is 0",
    "text_encoder_ratio": "`train` names no text encoder, `concepts` is not given, or `stages` say what is trained",
    "text_encoder_2_learning_rate": "`train` does not name text_encoder_2",
    "freeze_clip_norms": "`train` names no text encoder",
    "stages": "`concepts` is not given, which their chunks are packed from",
}


def prompt_problems(prompt: Prompt) -> list[str]:
    """Return why Stable Diffusion cannot draw a preview; empty when it can."""
    problems = []
    if prompt.sampler not in SAMPLERS:
        problems.append(f"sampler {prompt.sampler!r}: the recipe dreambooth has {', '.join(SAMPLERS)}")
    if wrong := [side for side in (prompt.width, prompt.height) if side % SIDE_MULTIPLE]:
        problems.append(f"{prompt.width}x{prompt.height}: {wrong[0]} is not a multiple of {SIDE_MULTIPLE}")
    for name in ("encode_scale", "attention_mask"):
        if getattr(prompt, name) is not None:
            problems.append(f"{name} is for the recipe stage_c")
    return problems
