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

import numpy as np
import pyarrow as pa

from training.buckets import Bucket, BucketError, BucketSettings, Placement, placement, placement_in, ratio_distance
from training.randomness import SampleIdentity

_DIGEST_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One showing of one sample. row: row number in the index the plan was made from."""

    row: int
    key: str
    concept: str
    occurrence: int
    loss_weight: float

    def identity(self, *, seed: int, epoch: int, chunk: str) -> SampleIdentity:
        """Return whose random numbers this showing uses."""
        return SampleIdentity(seed, epoch, chunk, self.key, self.concept, self.occurrence)


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


@dataclass(frozen=True, slots=True)
class PlanDrop:
    """A sample of the index that has no bucket, with a snake_case reason."""

    key: str
    reason: str
    detail: str


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
        for micro_batch in self._micro_batches():
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

    def summary(self) -> str:
        """Return a text table: images per bucket, how full the micro-batches are, crop loss, steps, exposures."""
        losses: dict[Bucket, list[float]] = defaultdict(list)
        num_micro_batches: Counter[Bucket] = Counter()
        keys = set()
        for micro_batch in self._micro_batches():
            num_micro_batches[micro_batch.bucket] += 1
            losses[micro_batch.bucket] += [p.crop_loss_fraction for p in micro_batch.placements]
            keys |= {(sample.key, sample.concept) for sample in micro_batch.samples}

        def line(name: str, num_images: int, num_batches: int, crop_losses: list[float]) -> str:
            fill = num_images / (num_batches * self.micro_batch_size)
            mean, p99 = np.mean(crop_losses), np.percentile(crop_losses, 99)
            return f"{name:>11} {num_images:>8,} {num_batches:>13,} {fill:>7.1%} {mean:>10.1%} {p99:>9.1%}"

        lines = [f"{'bucket':>11} {'images':>8} {'micro-batches':>13} {'fill':>7} {'crop mean':>10} {'crop p99':>9}"]
        for bucket, num_images in self.images_per_bucket.items():
            lines.append(line(str(bucket), num_images, num_micro_batches[bucket], losses[bucket]))
        everything = [loss for bucket_losses in losses.values() for loss in bucket_losses]
        lines.append(line("all", self.num_images, sum(num_micro_batches.values()), everything))
        lines.append(
            f"{self.chunk} epoch {self.epoch}: {len(self.steps):,} steps of {self.micro_batches_per_step} micro-batches"
            f" of {self.micro_batch_size}, {self.num_images:,} exposures of {len(keys):,} samples"
        )
        for reason in sorted({drop.reason for drop in self.drops}):
            dropped = [drop for drop in self.drops if drop.reason == reason]
            lines.append(f"dropped {len(dropped):,} as {reason}, first {dropped[0].key} ({dropped[0].detail})")
        return "\n".join(lines)

    def _micro_batches(self) -> list[MicroBatch]:
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
    """Return the steps of one epoch: every (key, concept, occurrence) with a bucket exactly once.

    index: columns key, width, height, repeats, loss_weight; a column `concept` is used when there is one.
    remainder: what a bucket has left over becomes a smaller micro-batch (`short`), or moves into free places of the
    buckets with the nearest ratio when all of it can (`merge`). No image then loses more than merge_max_crop_loss of
    its area on top of what its own bucket costs, or goes to a bucket smaller by more than that, and with `no_upscale`
    none is enlarged.
    Samples without a bucket go to `drops`. Raises ValueError for bad numbers, a key that comes twice, or no sample.
    """
    if micro_batch_size < 1 or micro_batches_per_step < 1:
        raise ValueError(
            f"micro_batch_size ({micro_batch_size}) and micro_batches_per_step ({micro_batches_per_step}) must be"
            " at least 1"
        )
    if remainder not in ("short", "merge"):
        raise ValueError(f"remainder: must be short or merge, got {remainder!r}")
    sizes, drops = _expand(index, bucket_settings, chunk)

    def order(sample: PlannedSample, purpose: str) -> bytes:
        return sample.identity(seed=seed, epoch=epoch, chunk=chunk).digest(purpose)

    ordered = sorted(sizes, key=lambda sample: order(sample, "order"))
    if not ordered:
        raise ValueError(
            f"chunk {chunk}: none of its {index.num_rows:,} samples can be trained; {len(drops):,} dropped"
        )

    pools: dict[Bucket, list[tuple[PlannedSample, Placement]]] = defaultdict(list)
    for sample in ordered:
        own = sizes[sample][2]
        pools[own.bucket].append((sample, own))
    cut = {bucket: len(pool) // micro_batch_size * micro_batch_size for bucket, pool in pools.items()}
    full = [
        (bucket, pool[start : start + micro_batch_size])
        for bucket, pool in pools.items()
        for start in range(0, cut[bucket], micro_batch_size)
    ]
    rest = {bucket: pool[cut[bucket] :] for bucket, pool in pools.items() if len(pool) > cut[bucket]}
    if remainder == "merge":
        rest = _merge(rest, sizes, micro_batch_size, merge_max_crop_loss, bucket_settings.family != "no_upscale")

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


def _expand(
    index: pa.Table, settings: BucketSettings, chunk: str
) -> tuple[dict[PlannedSample, tuple[int, int, Placement]], list[PlanDrop]]:
    """Return every showing with its (scaled width, height, placement), and the samples that have no bucket."""
    columns = ["key", "width", "height", "repeats", "loss_weight"]
    keys, stored_widths, stored_heights, repeats, weights = (index.column(name).to_pylist() for name in columns)
    widths, heights = (
        [max(1, round(side * settings.source_scale)) for side in sides] for sides in (stored_widths, stored_heights)
    )
    concepts = index.column("concept").to_pylist() if "concept" in index.column_names else [""] * len(keys)
    seen: set[tuple[str, str]] = set()
    placements: dict[tuple[int, int], Placement | BucketError] = {}
    showings: dict[PlannedSample, tuple[int, int, Placement]] = {}
    drops = []
    for row, (key, concept, width, height) in enumerate(zip(keys, concepts, widths, heights, strict=True)):
        if (key, concept) in seen:
            raise ValueError(
                f"chunk {chunk}: key {key}{f' of concept {concept}' * bool(concept)} stands twice; pack again"
            )
        seen.add((key, concept))
        if (width, height) not in placements:
            try:
                placements[width, height] = placement(width, height, settings=settings)
            except BucketError as error:
                placements[width, height] = error
        own = placements[width, height]
        if isinstance(own, BucketError):
            drops.append(PlanDrop(key, own.reason, own.detail))
            continue
        for occurrence in range(repeats[row]):
            showings[PlannedSample(row, key, concept, occurrence, weights[row])] = (width, height, own)
    return showings, sorted(drops, key=lambda drop: drop.key)


def _merge(
    rest: dict[Bucket, list[tuple[PlannedSample, Placement]]],
    sizes: Mapping[PlannedSample, tuple[int, int, Placement]],
    micro_batch_size: int,
    max_crop_loss: float,
    may_enlarge: bool,
) -> dict[Bucket, list[tuple[PlannedSample, Placement]]]:
    """Dissolve the smallest remainders into free places of others. A remainder that has received stays."""
    rest = {bucket: list(members) for bucket, members in rest.items()}
    receivers: set[Bucket] = set()
    for bucket in sorted(rest, key=lambda b: (len(rest[b]), b)):
        if bucket in receivers:
            continue
        free = {b: micro_batch_size - len(members) for b, members in rest.items() if b != bucket}
        moves: list[tuple[Bucket, PlannedSample, Placement]] = []
        for sample, own in rest[bucket]:
            width, height, _ = sizes[sample]
            for other in sorted((b for b, n in free.items() if n), key=lambda b: (ratio_distance(width, height, b), b)):
                placed = placement_in(width, height, other)
                is_enlarged = placed.resized_width > width or placed.resized_height > height
                extra = placed.crop_loss_fraction - own.crop_loss_fraction
                # A small bucket of the same ratio costs no crop, but most of the pixels.
                fewer = 1 - other.width * other.height / (bucket.width * bucket.height)
                if max(extra, fewer) <= max_crop_loss and (may_enlarge or not is_enlarged):
                    moves.append((other, sample, placed))
                    free[other] -= 1
                    break
        if len(moves) == len(rest[bucket]):
            del rest[bucket]
            for other, sample, placed in moves:
                rest[other].append((sample, placed))
                receivers.add(other)
    return rest


def _canonical(value: Sequence[object]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
