"""What is wrong, or strange, about what a run is about to do. Pure functions, no torch.

A refusal cannot work, or would silently train something else than the settings say; a warning only looks like it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from training.batch_plan import BatchPlan
from training.buckets import Bucket
from training.caption_parts import known_groups
from training.config import RunConfig
from training.plan_totals import RunTotals
from training.plans import caption_settings
from training.schedules import HAS_WARMUP, NEEDS_HORIZON


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a plan."""

    severity: Literal["refused", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def check_plan(
    plan: BatchPlan, totals: RunTotals, *, config: RunConfig, num_processes: int | None = None
) -> tuple[Finding, ...]:
    """Return what is wrong with a run, refusals first. num_processes: ranks it will run on, when they are known."""
    found = [
        *_schedule(totals, config),
        *_batches(totals, config),
        *_sides(plan, config),
        *_intervals(plan, totals, config),
    ]
    if num_processes is not None:
        found += _ranks(plan, num_processes)
    return tuple(sorted(found, key=lambda finding: finding.severity != "refused"))


def check_captions(index: pa.Table, *, config: RunConfig) -> tuple[Finding, ...]:
    """Return a warning where the settings name groups that no caption of a chunk has; another chunk may have them."""
    try:
        caption_settings(config).check_groups(known_groups(index))
    except ValueError as error:
        return (Finding("warning", f"{error}, in this chunk"),)
    return ()


def _schedule(totals: RunTotals, config: RunConfig) -> Iterator[Finding]:
    schedule, num_steps = config.schedule, totals.num_steps
    if schedule.name in HAS_WARMUP and schedule.warmup_steps > num_steps:
        yield Finding(
            "refused",
            f"schedule.warmup_steps {schedule.warmup_steps:,} is more than the run's {num_steps:,} steps: the learning"
            f" rate would never reach {config.optimizer.learning_rate:g}; set fewer warm-up steps or more epochs",
        )
    if schedule.name in NEEDS_HORIZON and schedule.total_steps is not None:
        if schedule.total_steps < num_steps:
            yield Finding(
                "refused",
                f"schedule.total_steps {schedule.total_steps:,} is less than the run's {num_steps:,} steps: the last"
                f" {num_steps - schedule.total_steps:,} would train with a learning rate of"
                f" {config.optimizer.learning_rate * schedule.end_fraction:g}; set {num_steps}",
            )
        elif schedule.total_steps > num_steps:
            yield Finding(
                "warning",
                f"schedule.total_steps {schedule.total_steps:,} is more than the run's {num_steps:,} steps: it ends"
                " before the learning rate does",
            )
    if (warmup := config.caption.token_warmup_steps) > num_steps:
        yield Finding(
            "warning",
            f"caption.token_warmup_steps {warmup:,} is more than the run's {num_steps:,} steps: no caption is ever"
            " trained whole",
        )


def _batches(totals: RunTotals, config: RunConfig) -> Iterator[Finding]:
    size = config.batch.batch_size
    (smallest, fewest), (largest, most) = totals.smallest_epoch, totals.largest_epoch
    if fewest == 0:
        yield Finding("refused", f"chunk {smallest}: none of its samples can be trained; take it out of data.chunks")
    if most and size > most:
        yield Finding(
            "refused",
            f"batch.batch_size {size:,} is more than the {most:,} exposures of the largest chunk ({largest}): no step"
            " would be whole; set a smaller batch or pack larger chunks",
        )
    elif fewest and size > fewest:
        yield Finding(
            "warning",
            f"batch.batch_size {size:,} is more than the {fewest:,} exposures of chunk {smallest}: its only step is a"
            " small one",
        )


def _sides(plan: BatchPlan, config: RunConfig) -> Iterator[Finding]:
    multiple = config.recipe.side_multiple

    def fits(bucket: Bucket) -> bool:
        return bucket.width % multiple == bucket.height % multiple == 0

    if wrong := [str(bucket) for bucket in plan.images_per_bucket if not fits(bucket)]:
        yield Finding(
            "refused",
            f"{len(wrong)} buckets have sides that are no multiple of {multiple}, which the recipe's image encoder"
            f" needs, first {wrong[0]}; set buckets.step to a multiple of {multiple}",
        )


def _intervals(plan: BatchPlan, totals: RunTotals, config: RunConfig) -> Iterator[Finding]:
    never = f"never comes round in the run's {totals.num_steps:,} steps"
    if config.save.every_steps > totals.num_steps:
        yield Finding(
            "warning",
            f"save.every_steps {config.save.every_steps:,} {never}: states are saved at the end of chunks only, and a"
            f" kill costs up to {len(plan.steps) * totals.epochs:,} steps",
        )
    if config.preview.prompts and config.preview.every_steps > totals.num_steps:
        at_end = "only at the end of chunks" if config.preview.at_chunk_end else "never"
        yield Finding("warning", f"preview.every_steps {config.preview.every_steps:,} {never}: previews come {at_end}")
    exports = config.save.export_every_chunks
    if exports > totals.num_chunks:
        yield Finding(
            "warning",
            f"save.export_every_chunks {exports:,} never comes round in the run's {totals.num_chunks:,} chunks:"
            " weights are exported on command only",
        )


def _ranks(plan: BatchPlan, num_processes: int) -> Iterator[Finding]:
    per_step = plan.micro_batches_per_step
    num_rounds = sum(-(-len(step.micro_batches) // num_processes) for step in plan.steps)
    idle = 1 - sum(len(step.micro_batches) for step in plan.steps) / (num_rounds * num_processes)
    if num_processes > per_step:
        yield Finding(
            "warning",
            f"{num_processes} processes, but a step has {per_step} micro-batches (batch.batch_size /"
            f" batch.micro_batch_size): {num_processes - per_step} of them only ever run padding",
        )
    elif idle > 0.1:
        yield Finding(
            "warning",
            f"{num_processes} processes share {per_step} micro-batches a step: {idle:.0%} of all forwards are padding;"
            f" a multiple of {num_processes} would need none",
        )
