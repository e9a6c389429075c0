"""What a run is about to do, counted: buckets, fill, crop loss, steps, exposures, bytes, and what is wrong with it.

Text for people, plain data for programs. No torch, no files: who reads them is `inspect_run`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sharding.files import size_text
from training.batch_plan import BatchPlan
from training.buckets import Placement
from training.config import Prompt, RunConfig
from training.config.latents import latent_problems
from training.latent_sizes import check_previews, density_text, latent_size, picture_size, previews_text
from training.plan_checks import Finding, check_plan
from training.plan_totals import ChunkTotals, RunTotals, chunk_totals


@dataclass(frozen=True)
class BucketRow:
    """A line of the table: one bucket, or all."""

    bucket: str
    """Pixels in the encoder."""
    latent: str
    picture: str
    """Pixels of the pictures: the bucket / encode_scale."""
    num_images: int
    """Exposures of one epoch."""
    num_micro_batches: int
    fill_fraction: float
    """Images / places in the micro-batches."""
    crop_loss_mean: float
    """Share of a resized image that is cropped off."""
    crop_loss_p99: float
    num_enlarged: int
    """Exposures that are resized to more pixels than are stored, in either direction."""

    def __str__(self) -> str:
        return (
            f"{self.picture:>11} {self.bucket:>11} {self.latent:>8} {self.num_images:>9,}"
            f" {self.num_micro_batches:>13,} {self.fill_fraction:>7.1%} {self.crop_loss_mean:>10.1%}"
            f" {self.crop_loss_p99:>9.1%} {self.num_enlarged:>9,}"
        )


_HEADER = (
    f"{'pictures':>11} {'bucket':>11} {'latents':>8} {'images':>9} {'micro-batches':>13} {'fill':>7} {'crop mean':>10}"
    f" {'crop p99':>9} {'enlarged':>9}"
)


@dataclass(frozen=True)
class PlanReport:
    """One epoch of one chunk, and the run that it is part of."""

    chunk: str
    epoch: int
    digest: str
    """Of the batch plan."""
    density: str
    """What becomes of a picture of buckets.resolution."""
    previews: str
    """How many latents previews have; empty without any."""
    rows: tuple[BucketRow, ...]
    """The fullest bucket first; the last row is the sum."""
    num_steps: int
    micro_batches_per_step: int
    micro_batch_size: int
    num_exposures: int
    num_keys: int
    """Different samples among the exposures."""
    max_repeats: int
    loss_weights: tuple[float, float]
    """The smallest and the largest."""
    dropped: dict[str, tuple[int, str]]
    """By reason: how many samples, and the first with its evidence."""
    totals: ChunkTotals
    run: RunTotals
    latents_note: str
    """Format of latents encoded ahead, and why these settings can have none."""
    state: tuple[int, str] | None
    """Bytes of a state and what is in it; None when they were not asked for."""
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Why this run must not start."""
        return tuple(finding for finding in self.findings if finding.severity == "refused")

    def text(self) -> str:
        """Return the report for people."""
        chunk, run = self.totals, self.run
        epochs = f"{run.epochs} epoch{'s' * (run.epochs > 1)}"
        if run.most_epochs > run.epochs:
            epochs = f"{run.epochs} to {run.most_epochs} epochs"
        weights = "–".join(f"{weight:g}" for weight in sorted(set(self.loss_weights)))
        lines = [self.density, *[self.previews] * bool(self.previews), _HEADER, *map(str, self.rows)]
        lines.append(
            f"{self.chunk} epoch {self.epoch}: {self.num_steps:,} steps of {self.micro_batches_per_step} micro-batches"
            f" of {self.micro_batch_size}, {self.num_exposures:,} exposures of {self.num_keys:,} samples"
            f" (repeats at most {self.max_repeats}, loss weight {weights})"
        )
        for reason, (number, first) in self.dropped.items():
            lines.append(f"left out: {number:,} as {reason}, first {first}")
        lines.append(
            f"to read: {size_text(chunk.read_bytes)} an epoch of the chunk, {size_text(run.read_bytes)} in the run"
        )
        lines.append(
            f"latents, encoded ahead in {self.latents_note}: {size_text(chunk.latent_bytes)} for the chunk,"
            f" {size_text(run.latent_bytes)} for the run"
        )
        if self.state is not None:
            lines.append(f"a state: {size_text(self.state[0])} ({self.state[1]})")
        lines.append(
            f"the run: {run.num_chunks:,} chunks, {epochs} each, {run.num_steps:,} steps,"
            f" {run.num_exposures:,} exposures of {run.num_samples - run.num_dropped:,} samples"
            + f"; {run.num_dropped:,} samples have no bucket"
            * bool(run.num_dropped)
        )
        return "\n".join([*lines, *map(str, self.findings)])

    def values(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return asdict(self)


def plan_report(
    plan: BatchPlan,
    index: pa.Table,
    run: RunTotals,
    *,
    config: RunConfig,
    num_processes: int | None = None,
    state: tuple[int, str] | None = None,
    prompts: Sequence[Prompt] = (),
) -> PlanReport:
    """Count a plan made from `index`, as part of a run. num_processes: ranks it will run on, when they are known.

    prompts: of all previews.
    """
    samples = [sample for micro_batch in plan.micro_batches() for sample in micro_batch.samples]
    weights = [sample.loss_weight for sample in samples]
    dropped = {
        reason: (len(drops), f"{drops[0].key} ({drops[0].detail})")
        for reason in sorted({drop.reason for drop in plan.drops})
        for drops in [[drop for drop in plan.drops if drop.reason == reason]]
    }
    notes = [config.latents.dtype, *["mirrored ones, too"] * config.data.horizontal_flip]
    notes += [f"not possible now: {problem}" for problem in latent_problems(config)]
    return PlanReport(
        chunk=plan.chunk,
        epoch=plan.epoch,
        digest=plan.digest,
        density=density_text(config),
        previews=previews_text(prompts, config),
        rows=_rows(plan, index, config=config),
        num_steps=len(plan.steps),
        micro_batches_per_step=plan.micro_batches_per_step,
        micro_batch_size=plan.micro_batch_size,
        num_exposures=plan.num_images,
        num_keys=len({(sample.key, sample.concept) for sample in samples}),
        max_repeats=max(sample.occurrence for sample in samples) + 1,
        loss_weights=(min(weights), max(weights)),
        dropped=dropped,
        totals=chunk_totals(index, plan.chunk, config=config),
        run=run,
        latents_note="; ".join(notes),
        state=state,
        findings=(
            *check_plan(plan, run, config=config, num_processes=num_processes),
            *check_previews(plan, prompts, config=config),
        ),
    )


def _rows(plan: BatchPlan, index: pa.Table, *, config: RunConfig) -> tuple[BucketRow, ...]:
    widths: list[int] = index.column("width").to_pylist()
    heights: list[int] = index.column("height").to_pylist()
    losses: dict[str, list[float]] = defaultdict(list)
    num_micro_batches: dict[str, int] = defaultdict(int)
    num_enlarged: dict[str, int] = defaultdict(int)

    def is_enlarged(row: int, placed: Placement) -> bool:
        return placed.resized_width > widths[row] or placed.resized_height > heights[row]

    for micro_batch in plan.micro_batches():
        for name in (str(micro_batch.bucket), "all"):
            num_micro_batches[name] += 1
            losses[name] += [placed.crop_loss_fraction for placed in micro_batch.placements]
            num_enlarged[name] += sum(
                is_enlarged(sample.row, placed)
                for sample, placed in zip(micro_batch.samples, micro_batch.placements, strict=True)
            )
    sizes = {str(each): (latent_size(each, config), picture_size(each, config)) for each in plan.images_per_bucket}
    return tuple(
        BucketRow(
            bucket=name,
            latent=sizes.get(name, ("", ""))[0],
            picture=sizes.get(name, ("", ""))[1],
            num_images=len(losses[name]),
            num_micro_batches=num_micro_batches[name],
            fill_fraction=len(losses[name]) / (num_micro_batches[name] * plan.micro_batch_size),
            crop_loss_mean=float(np.mean(losses[name])),
            crop_loss_p99=float(np.percentile(losses[name], 99)),
            num_enlarged=num_enlarged[name],
        )
        for name in [*sizes, "all"]
    )
