"""The batch plan of a chunk: which samples make up which step, decided before the first image is read.

A pure function of the index, the buckets, the batch sizes, seed, epoch and chunk name. Order comes from hashes of
the samples' identities, not from a generator, and neither the index's row order nor the number of ranks enters.
No torch, no files.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import pyarrow as pa

from training.buckets import Bucket, BucketSettings, Placement
from training.remainders import Members, merge_remainders
from training.showings import PlanDrop, PlannedSample, all_showings

__all__ = [
    "BatchPlan",
    "MicroBatch",
    "PlanDrop",
    "PlannedSample",
    "RankMicroBatch",
    "Step",
    "make_batch_plan",
    "rank_share",
]

_DIGEST_FORMAT = 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one forward on one rank; placements[i] says how samples[i] gets into the bucket."""

    bucket: Bucket
    samples: tuple[PlannedSample, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer update over all ranks. number: from 0 within the plan."""

    number: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_images(self) -> int:
        """N of the loss (1/N) Σ wᵢ Lᵢ: images planned for the step, over all ranks; padding does not count."""
        return sum(len(micro_batch.samples) for micro_batch in self.micro_batches)


@dataclass(frozen=True, slots=True)
class RankMicroBatch:
    """A micro-batch as one rank runs it.

    number: position in the step. Padding has a position past the step's end and holds the step's first micro-batch:
    real data, so that all parameters get finite gradients, which the caller masks out.
    """

    number: int
    micro_batch: MicroBatch
    is_padding: bool


@dataclass(frozen=True)
class BatchPlan:
    """All steps of one epoch of a chunk."""

    chunk: str
    seed: int
    epoch: int
    micro_batch_size: int
    micro_batches_per_step: int
    steps: tuple[Step, ...]
    drops: tuple[PlanDrop, ...] = field(default=())
    """Not in any step, sorted by key."""

    @cached_property
    def num_images(self) -> int:
        """Exposures: repeats count."""
        return sum(step.num_images for step in self.steps)

    @cached_property
    def images_per_bucket(self) -> Mapping[Bucket, int]:
        """Exposures by bucket, the fullest first."""
        counts: Counter[Bucket] = Counter()
        for micro_batch in self.micro_batches():
            counts[micro_batch.bucket] += len(micro_batch.samples)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole list: order, buckets, sizes after resizing, weights; not of row numbers."""
        digest = hashlib.sha256(f"batch plan {_DIGEST_FORMAT}\n".encode())
        digest.update(_canonical([self.chunk, self.seed, self.epoch]))
        for step in self.steps:
            for number, micro_batch in enumerate(step.micro_batches):
                rows = [
                    [s.key, s.concept, s.occurrence, s.loss_weight, p.resized_width, p.resized_height]
                    for s, p in zip(micro_batch.samples, micro_batch.placements, strict=True)
                ]
                digest.update(_canonical([step.number, number, str(micro_batch.bucket), rows]))
        return digest.hexdigest()

    def micro_batches(self) -> list[MicroBatch]:
        """Return all of them in the order of training."""
        return [micro_batch for step in self.steps for micro_batch in step.micro_batches]


def make_batch_plan(
    index: pa.Table,
    *,
    bucket_settings: BucketSettings,
    micro_batch_size: int,
    micro_batches_per_step: int,
    remainder: Literal["short", "merge"] = "short",
    merge_max_crop_loss: float = 0.1,
    seed: int,
    epoch: int,
    chunk: str,
) -> BatchPlan:
    """Return the steps of one epoch: every (key, concept, occurrence) shown in it, with a bucket, exactly once.

    index: see `training.showings.all_showings`.
    remainder: what a bucket has left over becomes a smaller micro-batch (`short`), or moves into free places of the
    buckets with the nearest ratio when all of it can (`merge`). No image then loses more than merge_max_crop_loss of
    its area on top of what its own bucket costs, or goes to a bucket smaller by more than that, and with `no_upscale`
    none is enlarged.
    Samples without a bucket go to `drops`. Raises ValueError for bad numbers, what `all_showings` refuses,
    or no sample.
    """
    if micro_batch_size < 1 or micro_batches_per_step < 1:
        raise ValueError(
            f"micro_batch_size ({micro_batch_size}) and micro_batches_per_step ({micro_batches_per_step}) must be"
            " at least 1"
        )
    if remainder not in ("short", "merge"):
        raise ValueError(f"remainder: must be short or merge, got {remainder!r}")
    fits, drops = all_showings(index, bucket_settings, chunk=chunk, epoch=epoch)

    def order(sample: PlannedSample, purpose: str) -> bytes:
        return sample.identity(seed=seed, epoch=epoch, chunk=chunk).digest(purpose)

    ordered = sorted(fits, key=lambda sample: order(sample, "order"))
    if not ordered:
        raise ValueError(
            f"chunk {chunk}: none of its {index.num_rows:,} samples can be trained in epoch {epoch}; "
            f"{len(drops):,} dropped"
        )

    pools: dict[Bucket, Members] = defaultdict(list)
    for sample in ordered:
        own = fits[sample].placement
        pools[own.bucket].append((sample, own))
    cut = {bucket: len(pool) // micro_batch_size * micro_batch_size for bucket, pool in pools.items()}
    full = [
        (bucket, pool[start : start + micro_batch_size])
        for bucket, pool in pools.items()
        for start in range(0, cut[bucket], micro_batch_size)
    ]
    rest = {bucket: pool[cut[bucket] :] for bucket, pool in pools.items() if len(pool) > cut[bucket]}
    if remainder == "merge":
        rest = merge_remainders(
            rest,
            fits,
            micro_batch_size=micro_batch_size,
            max_crop_loss=merge_max_crop_loss,
            may_enlarge=bucket_settings.family != "no_upscale",
        )

    micro_batches = [
        MicroBatch(bucket, tuple(sample for sample, _ in members), tuple(placed for _, placed in members))
        for bucket, members in [*full, *rest.items()]
    ]
    micro_batches.sort(key=lambda micro_batch: order(micro_batch.samples[0], "micro-batch order"))
    steps = tuple(
        Step(number, tuple(micro_batches[start : start + micro_batches_per_step]))
        for number, start in enumerate(range(0, len(micro_batches), micro_batches_per_step))
    )
    return BatchPlan(chunk, seed, epoch, micro_batch_size, micro_batches_per_step, steps, tuple(drops))


def rank_share(step: Step, *, rank: int, world_size: int) -> list[RankMicroBatch]:
    """Return the ⌈M / W⌉ micro-batches that `rank` of `world_size` runs in a step of M, in order.

    Rank r takes micro-batches r, r + W, …; where it has none left it gets padding, so that all ranks run equally many.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 … {world_size - 1} of {world_size}, got {rank}")
    num_rounds = -(-len(step.micro_batches) // world_size)
    numbers = range(rank, num_rounds * world_size, world_size)
    return [
        RankMicroBatch(number, step.micro_batches[0 if is_padding else number], is_padding)
        for number in numbers
        for is_padding in [number >= len(step.micro_batches)]
    ]


def _canonical(value: Sequence[object]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
