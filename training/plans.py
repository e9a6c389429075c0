"""From a run's config to its batch plans and to the settings of loader and captions. No torch."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from training.batch_plan import BatchPlan, make_batch_plan
from training.buckets import Bucket, BucketSettings
from training.caption_text import CaptionSettings
from training.config import RunConfig

if TYPE_CHECKING:
    from training.chunk_data import PixelSettings


def bucket_settings(config: RunConfig) -> BucketSettings:
    """Return the bucket rule. Sizes of pictures are scaled by the recipe's encode_scale before a bucket is chosen."""
    width, height = config.buckets.resolution
    scale = config.recipe.encode_scale
    return BucketSettings(
        family=config.buckets.family,
        resolution_area=round(width * scale) * round(height * scale),
        step=config.buckets.step,
        min_side=config.buckets.min_side,
        max_side=config.buckets.max_side,
        long_side=round(max(width, height) * scale),
        ratios=config.buckets.ratios,
        source_scale=scale,
    )


def batch_plan(index: pa.Table, chunk: str, *, config: RunConfig, epoch: int) -> BatchPlan:
    """Return the plan of one epoch of a chunk."""
    return make_batch_plan(
        index,
        bucket_settings=bucket_settings(config),
        micro_batch_size=config.batch.micro_batch_size,
        micro_batches_per_step=config.batch.micro_batches_per_step,
        remainder=config.batch.remainder,
        merge_max_crop_loss=config.batch.merge_max_crop_loss,
        seed=config.seed,
        epoch=epoch,
        chunk=chunk,
    )


def caption_settings(config: RunConfig) -> CaptionSettings:
    """Return what happens to captions."""
    return CaptionSettings(**config.caption.model_dump(), total_steps=config.schedule.total_steps)


def still_caption_settings(config: RunConfig) -> CaptionSettings:
    """Return the same for captions that must not change over a run: nothing shuffled, dropped or warmed up."""
    return replace(
        caption_settings(config),
        shuffle=False,
        tag_dropout_fraction=0.0,
        tag_dropout_groups={},
        caption_dropout_fraction=0.0,
        caption_dropout_every_epochs=0,
        token_warmup_steps=0,
        token_warmup_fraction=0.0,
    )


def pixel_settings(config: RunConfig) -> "PixelSettings":
    """Return what happens to pixels."""
    from training.loading.colour import ColourJitter
    from training.loading.pixels import PixelSettings

    return PixelSettings(
        crop=config.data.crop,
        flip_fraction=0.5 if config.data.horizontal_flip else 0.0,
        colour_jitter=ColourJitter(**config.data.colour_jitter.model_dump()),
        with_masks=config.data.masks,
    )


def still_pixel_settings(config: RunConfig) -> "PixelSettings":
    """Return the same for pictures that must not change over a run: cut at the centre, not flipped, not jittered."""
    from training.loading.pixels import PixelSettings

    return PixelSettings(with_masks=config.data.masks)


def latent_bytes(bucket: Bucket, *, config: RunConfig) -> int:
    """Return the size of the latent of an image in this bucket, encoded ahead in latents.dtype."""
    recipe = config.recipe
    cells = (bucket.width // recipe.side_multiple) * (bucket.height // recipe.side_multiple)
    return recipe.latent_channels * cells * bytes_per_value(config.latents.dtype)


def bytes_per_value(dtype: str) -> int:
    """Return the size of a number in fp16, bf16 or fp32."""
    return 4 if dtype == "fp32" else 2
