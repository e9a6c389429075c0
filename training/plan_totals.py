"""Steps, exposures and bytes of every chunk of a run, without planning its order. No torch.

One index at a time is in memory, and of it the columns that count. That the numbers are those of the real plans is
tested; with `remainder = "merge"`, where they depend on the order, the real plans are made.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.chunk import Chunk, ChunkError
from training.buckets import Bucket, BucketError
from training.config import RunConfig
from training.plans import batch_plan, bucket_settings, latent_bytes
from training.showings import fit_or_reason
from training.stages import epochs_of, stage_config

_COLUMNS = ["key", "width", "height", "repeats", "loss_weight", "image_bytes", "mask_bytes"]


@dataclass(frozen=True)
class ChunkTotals:
    """What one chunk amounts to. Bytes are of one epoch."""

    name: str
    num_samples: int
    """Rows of the index, those without a bucket included."""
    num_dropped: int
    """Samples without a bucket."""
    num_exposures: int
    """Of all epochs: repeats × epochs, summed."""
    num_steps: int
    """Of all epochs."""
    read_bytes: int
    """Images and masks, as often as they are repeated."""
    latent_bytes: int
    """Of latents of all trained samples, encoded ahead in latents.dtype; with flips, of mirrored ones, too."""


@dataclass(frozen=True)
class RunTotals:
    """Sums over the chunks of a run, and the extremes that checks need."""

    num_chunks: int
    epochs: int
    """Of the chunk with the fewest."""
    most_epochs: int
    num_samples: int
    num_dropped: int
    num_exposures: int
    num_steps: int
    read_bytes: int
    """Of all epochs."""
    latent_bytes: int
    smallest_epoch: tuple[str, int]
    """The chunk with the fewest exposures per epoch, and their number."""
    largest_epoch: tuple[str, int]


def chunk_totals(index: pa.Table, chunk: str, *, config: RunConfig) -> ChunkTotals:
    """Return the totals of a chunk. index: at least key, width, height, repeats, loss_weight, image_bytes, mask_bytes.

    A chunk of which nothing can be trained has 0 steps; the plan itself would raise.
    """
    settings = bucket_settings(config)
    width, height, repeats = (np.asarray(index.column(name), np.int64) for name in ("width", "height", "repeats"))
    sizes, size_of_row = np.unique(width << 32 | height, return_inverse=True)
    showings: Counter[Bucket] = Counter()
    num_dropped = latents = 0
    variants = 2 if config.data.horizontal_flip else 1
    is_kept = np.ones(len(sizes), bool)
    per_size = (np.bincount(size_of_row, weights, len(sizes)).astype(int) for weights in (None, repeats, repeats > 0))
    for number, (size, rows, times, shown) in enumerate(zip(sizes.tolist(), *per_size, strict=True)):
        own = fit_or_reason(size >> 32, size & 0xFFFFFFFF, settings)
        if isinstance(own, BucketError):
            num_dropped += int(rows)
            is_kept[number] = False
            continue
        bucket = own.placement.bucket
        showings[bucket] += int(times)
        latents += latent_bytes(bucket, config=config) * int(shown) * variants
    stored = sum(np.asarray(index.column(name), np.int64) for name in ("image_bytes", "mask_bytes"))
    return ChunkTotals(
        name=chunk,
        num_samples=index.num_rows,
        num_dropped=num_dropped,
        num_exposures=config.data.epochs * showings.total(),
        num_steps=_num_steps(index, chunk, showings, config),
        read_bytes=int((stored * repeats * is_kept[size_of_row]).sum()),
        latent_bytes=latents,
    )


def _num_steps(index: pa.Table, chunk: str, showings: Counter[Bucket], config: RunConfig) -> int:
    if not showings.total():
        return 0
    if config.batch.remainder == "merge":
        plans = (batch_plan(index, chunk, config=config, epoch=epoch) for epoch in range(config.data.epochs))
        return sum(len(plan.steps) for plan in plans)
    num_micro_batches = sum(-(-number // config.batch.micro_batch_size) for number in showings.values())
    return config.data.epochs * -(-num_micro_batches // config.batch.micro_batches_per_step)


def run_totals(chunks: Iterable[Chunk], *, config: RunConfig) -> RunTotals:
    """Return the sums over the chunks of a run. Raises ChunkError when an index cannot be read, or there is none."""
    every = [chunk_totals(_columns(chunk), chunk.name, config=stage_config(config, chunk.name)) for chunk in chunks]
    if not every:
        raise ChunkError("this run has no chunk; check data.workspace and data.chunks")
    epochs_of_chunk = epochs_of(config)
    per_epoch = [(total.num_exposures // epochs_of_chunk(total.name), total.name) for total in every]
    epochs = [epochs_of_chunk(total.name) for total in every]
    return RunTotals(
        num_chunks=len(every),
        epochs=min(epochs),
        most_epochs=max(epochs),
        num_samples=sum(total.num_samples for total in every),
        num_dropped=sum(total.num_dropped for total in every),
        num_exposures=sum(total.num_exposures for total in every),
        num_steps=sum(total.num_steps for total in every),
        read_bytes=sum(number * total.read_bytes for number, total in zip(epochs, every, strict=True)),
        latent_bytes=sum(total.latent_bytes for total in every),
        smallest_epoch=min(per_epoch)[::-1],
        largest_epoch=max(per_epoch)[::-1],
    )


def _columns(chunk: Chunk) -> pa.Table:
    try:
        return pq.read_table(chunk.index_path, columns=_COLUMNS, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ChunkError(f"{chunk.index_path}: cannot be read ({error}); run `python -m sharding verify`") from error
