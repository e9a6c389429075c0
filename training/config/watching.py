"""Settings of a run: previews, validation and trackers: what people look at while a run goes on."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sharding.config import Config


class Prompt(Config):
    """One preview."""

    text: str
    """`[filewords]` becomes one caption of the run's first chunk, always the same."""
    negative: str = ""
    width: int = Field(1024, gt=0)
    height: int = Field(1024, gt=0)
    """Pixels of the picture that the full cascade would make."""
    seed: int = Field(0, ge=0)
    steps: int = Field(20, gt=0)
    guidance: float = Field(4.0, ge=0)
    sampler: str = "ddpm"
    """One that the recipe has."""
    encode_scale: float | None = Field(None, gt=0, le=1)
    """Latent density of this picture; default: that of training, `stage_c.encode_scale`."""
    max_tokens: Literal[75, 150, 225] | None = None
    """Tokens of text and negative; default: as in training."""
    attention_mask: bool | None = None
    """Whether padding is masked; default: as in training."""


class PreviewConfig(Config):
    """Pictures generated during training: fixed prompts, seeds and sizes."""

    FREE: ClassVar = frozenset({"every_steps", "at_chunk_end", "prompts", "file"})

    every_steps: int = Field(0, ge=0)
    """Make previews whenever the global step is a multiple of this; 0 makes them at the end of chunks only."""
    at_chunk_end: bool = True
    """Make previews when a chunk is done."""
    prompts: tuple[Prompt, ...] = ()
    """Tables of text, negative, width, height, seed, steps, guidance, sampler."""
    file: Path | None = None
    """kohya's prompt file (.txt, .toml, .json); its prompts come after `prompts`."""


class ValidationConfig(Config):
    """The loss on pictures that are not trained, always at the same timesteps and with the same noise."""

    FREE: ClassVar = frozenset({"chunk", "every_steps", "at_chunk_end", "max_images"})

    chunk: str | None = None
    """A held-out chunk of the workspace, `newest/held-out`; without it there is no validation."""
    every_steps: int = Field(0, ge=0)
    """Validate whenever the global step is a multiple of this; 0 validates at the end of chunks only."""
    at_chunk_end: bool = True
    """Validate when a chunk is trained."""
    max_images: int = Field(256, gt=0)
    """At most so many of the chunk, always the same ones."""

    @model_validator(mode="after")
    def _has_a_chunk(self) -> "ValidationConfig":
        if self.every_steps and self.chunk is None:
            raise ValueError(f"every_steps is {self.every_steps}, but no chunk is named: which pictures are held out?")
        return self


class TrackerConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    FREE: ClassVar = frozenset(
        {
            "tensorboard", "wandb", "wandb_project", "trace", "spike_factor", "on_spike", "webhook",
            "alert_wait_fraction", "alert_wait_steps", "alert_free_states",
        }
    )  # fmt: skip

    tensorboard: bool = True
    """Event files in the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """One W&B run over all launches; offline writes files to sync later."""
    wandb_project: str = "chunkline"
    """W&B's project name."""
    trace: bool = False
    """Write keys, captions, timesteps, losses and rates of every step to trace.jsonl (for proofs)."""
    spike_factor: float = Field(8.0, ge=0)
    """A spike: a step whose loss is this many robust standard deviations above the median of the last 100; 0 is off."""
    on_spike: Literal["warn", "rollback"] = "warn"
    """`rollback`: go back to the state before a spike and pass over its step, once per chunk; after that only warn."""
    webhook: str = ""
    """Web address that alerts are POSTed to as JSON. One that holds a secret belongs into the environment variable
    CHUNKLINE_WEBHOOK instead. Alerts go to W&B, too, when it is on."""
    alert_wait_fraction: float = Field(0.5, ge=0, le=1)
    """Alert when steps wait for data for more than this share of their time; 0 is off."""
    alert_wait_steps: int = Field(50, gt=0)
    """So many in a row."""
    alert_free_states: float = Field(2.0, ge=0)
    """Alert when fewer than so many more states fit on the disk; 0 is off."""

    @model_validator(mode="after")  # of the table, because errors about a key show its value: here maybe a secret
    def _webhook_is_an_address(self) -> "TrackerConfig":
        if self.webhook and not self.webhook.startswith(("https://", "http://")):
            raise ValueError("webhook must begin with https:// or http://")
        return self

    @model_validator(mode="after")
    def _spikes_are_judged(self) -> "TrackerConfig":
        if self.on_spike == "rollback" and self.spike_factor == 0:
            raise ValueError('on_spike is "rollback", but spike_factor is 0: no loss is judged to be a spike')
        return self
