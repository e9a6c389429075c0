"""Settings of a run: what is trained, in which order, how images become steps, and their sizes."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from sharding.config import Config
from training.bucket_list import STABLE_CASCADE_RATIOS, Family


def _ratio(value: Any) -> Any:
    """Turn "16:9" into a number; numbers stay."""
    if not isinstance(value, str):
        return value
    width, colon, height = value.partition(":")
    if not (colon and width.strip().isdecimal() and height.strip().isdecimal() and int(height)):
        raise ValueError(f'must be a number or "width:height", got {value!r}')
    return int(width) / int(height)


class ColourJitterConfig(Config):
    """How far colours may move; 0 is off."""

    brightness: float = Field(0.0, ge=0, le=1)
    """Colours times a factor between 1 - x and 1 + x."""
    contrast: float = Field(0.0, ge=0, le=1)
    """The same factor on the distance to the crop's mean grey."""
    saturation: float = Field(0.0, ge=0, le=1)
    """The same factor on the distance to each pixel's grey."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Part of the colour circle, either way."""


class DataConfig(Config):
    """What is trained, in which order."""

    FREE: ClassVar = frozenset(
        {"workspace", "chunks", "remote", "cache_gb", "workers", "prefetch", "verify_shards", "max_broken_fraction"}
    )

    workspace: Path
    """Workspace that holds chunks/."""
    remote: str | None = None
    """URL of a workspace elsewhere (`s3://bucket/workspace`, any that fsspec knows); `workspace` is then a folder of
    this machine that its chunks are fetched into ahead of need, for one run at a time."""
    cache_gb: float = Field(100.0, gt=0)
    """With `remote`: how large the shards in `workspace` may become; those of done chunks go first."""
    chunks: tuple[str, ...] = ("combined/*",)
    """Chunk names or glob patterns (`newest/*`), in training order; a pattern gives its chunks sorted by name."""
    epochs: int = Field(1, gt=0)
    """Passes over each chunk before the next one."""
    workers: int = Field(2, ge=0)
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = Field(4, gt=0)
    """Micro-batches each worker keeps ready."""
    verify_shards: Literal["each_use", "size"] = "each_use"
    """Before it is decoded, every image's SHA-256 is compared with the index (about 0.5 ms per MB); `size` looks at the
    sizes of the shards at the start only."""
    horizontal_flip: bool = False
    """Mirror half of the exposures, by counted randomness. Wrong for captions that say left and right."""
    crop: Literal["centre", "random", "focus"] = "centre"
    """Where the bucket's rectangle is cut out of the resized picture; `focus`: around the centre of gravity of its
    mask, or the picture's centre where there is none."""
    masks: bool = True
    """Samples that have a mask are trained where it is white; false ignores masks."""
    colour_jitter: ColourJitterConfig = ColourJitterConfig()
    """Brightness, contrast, saturation and hue moved at random, by counted randomness."""
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

    family: Family = "no_upscale"
    """kohya's bucket_no_upscale, kohya's predefined area buckets, a list of aspect ratios (by default the official
    StableCascade one), or the wiki's table: longer side fixed, the shorter one in steps."""
    resolution: tuple[int, int] = (1024, 1024)
    """Width and height of a picture as people see it, not of what the encoder sees: that is × `stage_c.encode_scale`.
    [1024, 1024] trains at most 768×768 pixels and 24×24 latents with the default 3/4, with kohya's 1 1024×1024 and
    32×32. The product bounds a bucket's area, the longer one is the side of `long_side`; `plan` prints what comes
    of it."""
    step: int = Field(64, gt=0)
    """Bucket sides are multiples of this many pixels fed to the image encoder; a multiple of 32."""
    min_side: int | None = Field(None, gt=0)
    """Shortest side of a bucket. Default: 256 for `area`, half the long side for `long_side`, else none. With
    `no_upscale` (where kohya ignores it) an image that would need a shorter one is left out, with a reason."""
    max_side: int | None = Field(None, gt=0)
    """Longest side of a bucket. Default: 4096 for `area`, else none. With `no_upscale` (where kohya ignores it) an
    image is made smaller until it fits."""
    ratios: tuple[Annotated[float, BeforeValidator(_ratio), Field(gt=0)], ...] = STABLE_CASCADE_RATIOS
    """Of the family `ratios`: numbers or "3:4"; each stands for its inverse, too. [1] trains plain squares."""
