"""Settings of a run: previews and trackers: what people look at while a run goes on."""

from typing import ClassVar, Literal

from pydantic import Field

from sharding.config import Config


class Prompt(Config):
    """One preview."""

    text: str
    negative: str = ""
    width: int = Field(1024, gt=0)
    height: int = Field(1024, gt=0)
    """Pixels of the picture that the full cascade would make."""
    seed: int = Field(0, ge=0)
    steps: int = Field(20, gt=0)
    guidance: float = Field(4.0, ge=0)


class PreviewConfig(Config):
    """Pictures generated during training: fixed prompts, seeds and sizes."""

    FREE: ClassVar = frozenset({"every_steps", "at_chunk_end", "prompts"})

    every_steps: int = Field(0, ge=0)
    """Make previews whenever the global step is a multiple of this; 0 makes them at the end of chunks only."""
    at_chunk_end: bool = True
    """Make previews when a chunk is done."""
    prompts: tuple[Prompt, ...] = ()
    """Tables of text, negative, width, height, seed, steps, guidance."""


class TrackerConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    FREE: ClassVar = frozenset({"tensorboard", "wandb", "wandb_project", "trace"})

    tensorboard: bool = True
    """Event files in the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """One W&B run over all launches; offline writes files to sync later."""
    wandb_project: str = "chunkline"
    """W&B's project name."""
    trace: bool = False
    """Write keys, captions, timesteps, losses and rates of every step to trace.jsonl (for proofs)."""
