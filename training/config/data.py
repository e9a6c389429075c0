"""Settings of a run: what is trained, in which order, how images become steps, and their sizes."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sharding.config import Config


class DataConfig(Config):
    """What is trained, in which order."""

    FREE: ClassVar = frozenset({"workspace", "chunks", "workers", "prefetch", "max_broken_fraction"})

    workspace: Path
    """Workspace that holds chunks/."""
    chunks: tuple[str, ...] = ("combined/*",)
    """Chunk names or glob patterns (`newest/*`), in training order; a pattern gives its chunks sorted by name."""
    epochs: int = Field(1, gt=0)
    """Passes over each chunk before the next one."""
    workers: int = Field(2, ge=0)
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = Field(4, gt=0)
    """Micro-batches each worker keeps ready."""
    horizontal_flip: bool = False
    """Mirror half of the exposures, by counted randomness. Wrong for captions that say left and right."""
    crop: Literal["centre", "random"] = "centre"
    """Where the bucket's rectangle is cut out of the resized picture."""
    max_broken_fraction: float = Field(0.01, ge=0, le=1)
    """The run stops with exit code 3 when more than this share of a chunk's images cannot be read."""


class BatchConfig(Config):
    """How images become steps. World size is not part of it."""

    batch_size: int = Field(16, gt=0)
    """Images per optimizer step over all ranks, at most; a multiple of micro_batch_size."""
    micro_batch_size: int = Field(2, gt=0)
    """Images per forward on one rank."""
    remainder: Literal["short", "merge"] = "short"
    """A bucket's left-over images become a smaller micro-batch, or join the nearest bucket."""
    merge_max_crop_loss: float = Field(0.1, ge=0, lt=1)
    """With remainder = "merge": the largest share of an image that joining another bucket may cut off."""

    @model_validator(mode="after")
    def _divides(self) -> "BatchConfig":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}: "
                "a step is made of whole micro-batches"
            )
        return self

    @property
    def micro_batches_per_step(self) -> int:
        """M of the design."""
        return self.batch_size // self.micro_batch_size


class BucketConfig(Config):
    """Aspect-ratio buckets."""

    family: Literal["no_upscale", "area", "ratios"] = "no_upscale"
    """kohya's bucket_no_upscale, kohya's predefined area buckets, or the official StableCascade ratio list."""
    resolution: tuple[int, int] = (1024, 1024)
    """Width and height of the full picture; their product × encode_scale² bounds a bucket's area."""
    step: int = Field(64, gt=0)
    """Bucket sides are multiples of this many pixels fed to the image encoder; a multiple of 32."""
    min_side: int = Field(256, gt=0)
    """Shortest side of the `area` family."""
    max_side: int = Field(4096, gt=0)
    """Longest side of the `area` family."""
