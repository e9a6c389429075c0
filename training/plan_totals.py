"""Steps, exposures and bytes of every chunk of a run, without planning its order. No torch.

One index at a time is in memory, and of it the columns that count. That the numbers are those of the real plans is
tested; with `remainder = "merge"`, where they depend on the order, the real plans are made.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.chunk import Chunk, ChunkError
from training.buckets import Bucket, BucketError
from training.config import RunConfig
from training.plans import batch_plan, bucket_settings, latent_bytes
from training.showings import fit_or_reason, shown_epochs
from training.stages import epochs_of, stage_config

_COLUMNS = ["key", "width", "height", "repeats", "loss_weight", "image_bytes", "mask_bytes"]
_OF_TURNS = ["every_epochs", "epoch_offset"]
"""Columns that an index may lack."""


@dataclass(frozen=True)
class ChunkTotals:
    """What one chunk amounts to. Bytes are of one epoch, on average."""

    name: str
    num_samples: int
    """Rows of the index, those without a bucket included."""
    num_dropped: int
    """Samples without a bucket."""
    num_exposures: int
    """Of all epochs: repeats × epochs in which a sample is shown, summed."""
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

    every_epochs and epoch_offset are used when they are there. A chunk of which nothing can be trained has 0 steps;
    the plan itself would raise.
    """
    settings = bucket_settings(config)
    width, height, repeats = (np.asarray(index.column(name), np.int64) for name in ("width", "height", "repeats"))
    sizes, size_of_row = np.unique(width << 32 | height, return_inverse=True)
    fits = [fit_or_reason(size >> 32, size & 0xFFFFFFFF, settings) for size in sizes.tolist()]
    buckets = [None if isinstance(own, BucketError) else own.placement.bucket for own in fits]
    is_kept = np.array([bucket is not None for bucket in buckets], bool)[size_of_row]
    turns = _turns(index, chunk, config.data.epochs)
    exposures = repeats * is_kept * sum((number * is_shown for is_shown, number in turns), np.zeros_like(repeats))
    showings = []
    for is_shown, number in turns:
        counts: Counter[Bucket] = Counter()
        for bucket, times in zip(buckets, _sums(size_of_row, repeats * is_shown, len(sizes)), strict=True):
            if bucket is not None:
                counts[bucket] += times
        showings.append((counts, number))
    variants = 2 if config.data.horizontal_flip else 1
    latents = sum(
        latent_bytes(bucket, config=config) * times * variants
        for bucket, times in zip(buckets, _sums(size_of_row, exposures > 0, len(sizes)), strict=True)
        if bucket is not None
    )
    stored = sum(np.asarray(index.column(name), np.int64) for name in ("image_bytes", "mask_bytes"))
    return ChunkTotals(
        name=chunk,
        num_samples=index.num_rows,
        num_dropped=int((~is_kept).sum()),
        num_exposures=int(exposures.sum()),
        num_steps=_num_steps(index, chunk, showings, config),
        read_bytes=int((stored * exposures).sum()) // config.data.epochs,
        latent_bytes=latents,
    )


def _turns(index: pa.Table, chunk: str, epochs: int) -> list[tuple[np.ndarray[Any, Any], int]]:
    """Return each different choice of rows that an epoch shows, as bools, and the number of epochs that show it."""
    if _OF_TURNS[0] not in index.column_names:
        return [(np.ones(index.num_rows, bool), epochs)]
    rows = np.array(list(shown_epochs(index, chunk=chunk)), np.int64).reshape(-1, 2)
    turns, turn_of_row = np.unique(rows, axis=0, return_inverse=True)
    shown = Counter(tuple((epoch % turns[:, 0] == turns[:, 1]).tolist()) for epoch in range(epochs))
    return [(np.array(is_shown, bool)[turn_of_row], number) for is_shown, number in shown.items()]


def _sums(size_of_row: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], num_sizes: int) -> list[int]:
    sums: list[int] = np.bincount(size_of_row, weights, num_sizes).astype(int).tolist()
    return sums


def _num_steps(index: pa.Table, chunk: str, showings: Sequence[tuple[Counter[Bucket], int]], config: RunConfig) -> int:
    if not any(counts.total() for counts, _ in showings):
        return 0
    if config.batch.remainder == "merge":
        plans = (batch_plan(index, chunk, config=config, epoch=epoch) for epoch in range(config.data.epochs))
        return sum(len(plan.steps) for plan in plans)
    num_steps = 0
    for counts, number in showings:
        num_micro_batches = sum(-(-times // config.batch.micro_batch_size) for times in counts.values())
        num_steps += number * -(-num_micro_batches // config.batch.micro_batches_per_step)
    return num_steps


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
        there = pq.read_schema(chunk.index_path).names
        names = [*_COLUMNS, *(name for name in _OF_TURNS if name in there)]
        return pq.read_table(chunk.index_path, columns=names, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ChunkError(f"{chunk.index_path}: cannot be read ({error}); run `python -m sharding verify`") from error
