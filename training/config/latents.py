"""Settings of a run: latents and text outputs encoded ahead of training."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from sharding.config import Config

if TYPE_CHECKING:
    from training.config.run import RunConfig


class LatentsConfig(Config):
    """What `python -m training encode-latents` makes, and whether a run trains from it."""

    FREE: ClassVar = frozenset({"folder"})

    use: bool = False
    """Train from latents encoded ahead instead of pixels: nothing is decoded, the image encoder is not loaded."""
    text: bool = False
    """Train from the text encoder's outputs encoded ahead, too: only for captions that never change."""
    folder: Path | None = None
    """Where they lie; default: `latents` in the workspace."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Format they are stored in; with fp32 a CPU trains the same bits as from pixels."""


def latent_problems(config: "RunConfig") -> list[str]:
    """Return why a picture of this run does not have one latent, or two with flips; empty when it has."""
    data, problems = config.data, []
    if data.crop == "random":
        problems.append(
            'data.crop "random" cuts every showing elsewhere, and a latent is encoded once; use "centre" or "focus"'
        )
    if any(data.colour_jitter.model_dump().values()):
        problems.append(
            "data.colour_jitter gives every showing other colours, and a latent is encoded once; leave it out"
        )
    if config.stage_c is not None and config.stage_c.image_embedding_fraction:
        problems.append(
            "stage_c.image_embedding_fraction shows the network pixels, and there would be none; leave it out"
        )
    return problems


def text_problems(config: "RunConfig") -> list[str]:
    """Return why a picture of this run has more than one text output; empty when each caption has one for ever."""
    caption = config.caption
    changing = {
        "shuffle": caption.shuffle,
        "tag_dropout_fraction": caption.tag_dropout_fraction,
        "tag_dropout_groups": any(caption.tag_dropout_groups.values()),
        "caption_dropout_fraction": caption.caption_dropout_fraction,
        "caption_dropout_every_epochs": caption.caption_dropout_every_epochs,
        "token_warmup_steps": caption.token_warmup_steps,
        "token_warmup_fraction": caption.token_warmup_fraction,
        'lines = "random"': caption.lines == "random",
        "wildcards": caption.wildcards,
        "mix": caption.mix,
    }
    problems = []
    if names := [f"caption.{name}" for name, is_on in changing.items() if is_on]:
        problems.append(f"{', '.join(names)}: captions change from showing to showing, a text output is encoded once")
    if config.trains_in_text_encoder:
        key = config.recipe.text_key if config.recipe.train_text_encoder else "lora.text_encoder or tokens"
        problems.append(f"{key}: what a trained text encoder gives changes with every step")
    return problems


def needs_text_model(config: "RunConfig") -> bool:
    """Whether a run has its text model in memory: not when its outputs are made ahead and no preview is drawn."""
    preview = config.preview
    return not config.latents.text or bool(preview.prompts) or preview.file is not None


def ahead_problems(config: "RunConfig") -> list[str]:
    """Return why a run cannot train from what its settings ask for; empty when it can."""
    problems = [f"latents.use: {problem}" for problem in latent_problems(config) if config.latents.use]
    return problems + [f"latents.text: {problem}" for problem in text_problems(config) if config.latents.text]
