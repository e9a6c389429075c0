"""Which pictures the verdict measures, at which noise levels: the same at every step of a run, in every stage.

Each chosen picture comes once per timestep, so that the losses of few pictures can be compared with each other's. No
torch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import fsum

import pyarrow as pa

from training.batch_plan import BatchPlan, MicroBatch, PlannedSample, Step
from training.buckets import Bucket, Placement
from training.config import RunConfig
from training.plans import batch_plan
from training.randomness import SampleIdentity

LABEL = "verdict"
"""Stands for the chunk in random numbers, so that a picture has the same noise in all stages."""
CLASS_SUFFIX = "/class"
"""Ends the concept of a class picture in an index."""

Shown = tuple[PlannedSample, Placement]


def group_of(index: pa.Table) -> list[str]:
    """Return of each row the concept, or the dataset where the index knows of no concepts."""
    name = "concept" if "concept" in index.column_names else "dataset"
    values: list[str] = index.column(name).to_pylist()
    return values


def base_plans(index: pa.Table, chunk: str, *, config: RunConfig) -> list[BatchPlan]:
    """Return plans that show what a chunk is trained on.

    What was encoded ahead is found by the plans of all epochs; else one of all pictures is enough, whether they are
    shown in every epoch or not.
    """
    if config.latents.use or config.latents.text:
        return [batch_plan(index, chunk, config=config, epoch=epoch) for epoch in range(config.data.epochs)]
    always = index.drop_columns([name for name in ("every_epochs", "epoch_offset") if name in index.column_names])
    return [batch_plan(always, chunk, config=config, epoch=0)]


def fixed_plan(
    plans: Iterable[BatchPlan],
    groups: Sequence[str],
    *,
    seed: int,
    pictures_per_group: int,
    num_timesteps: int,
    micro_batch_size: int,
) -> BatchPlan:
    """Return one step of all micro-batches: of each group some pictures, each as often as there are timesteps.

    groups: of each row of the index. Which pictures is counted from seed and key, so that adding some changes few.
    """
    found: dict[str, dict[str, Shown]] = defaultdict(dict)
    for plan in plans:
        for micro_batch in plan.micro_batches():
            for sample, placed in zip(micro_batch.samples, micro_batch.placements, strict=True):
                found[groups[sample.row]].setdefault(sample.key, (sample, placed))

    def order(shown: Shown) -> bytes:
        return shown[0].identity(seed=seed, epoch=0, chunk=LABEL).digest("verdict")

    by_bucket: dict[Bucket, list[Shown]] = defaultdict(list)
    for _, pictures in sorted(found.items()):
        first = [(replace(sample, occurrence=0), placed) for sample, placed in pictures.values()]
        for sample, placed in sorted(first, key=order)[:pictures_per_group]:
            by_bucket[placed.bucket] += [
                (replace(sample, occurrence=number, loss_weight=1.0), placed) for number in range(num_timesteps)
            ]
    micro_batches = [
        MicroBatch(bucket, tuple(sample for sample, _ in part), tuple(placed for _, placed in part))
        for bucket, shown in sorted(by_bucket.items(), key=lambda item: str(item[0]))
        for part in (shown[start : start + micro_batch_size] for start in range(0, len(shown), micro_batch_size))
    ]
    return BatchPlan(LABEL, seed, 0, micro_batch_size, len(micro_batches), (Step(0, tuple(micro_batches)),))


def timestep_of(timesteps: Sequence[float], *, between: tuple[float, float]) -> Callable[[SampleIdentity], float]:
    """Return a function from a showing to its timestep, inside the range that is trained."""
    low, high = between
    return lambda identity: low + (high - low) * timesteps[identity.occurrence]


def means(losses: Iterable[tuple[str, float]]) -> Mapping[str, float]:
    """Return the mean loss of each group; the order does not matter. losses: (group, loss)."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for group, loss in losses:
        by_group[group].append(loss)
    return {group: fsum(found) / len(found) for group, found in sorted(by_group.items())}
