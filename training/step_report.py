"""What a step is in metrics.jsonl, in trace.jsonl and in the log. Pure functions of what the loop knows."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.batch_plan import BatchPlan, Step
from training.position import Position
from training.recipes.base import SampleResult
from training.timestep_bands import mean_by_band


@dataclass(frozen=True)
class StepReport:
    """One finished step, the same on all ranks but for the times."""

    step: Step
    before: Position
    after: Position
    results: Sequence[SampleResult]
    """Of the images that were read, in plan order."""
    broken: Sequence[tuple[str, str]]
    """(key, reason) of images that failed."""
    problem: str
    """Why there was no update: not_finite, no_image or passed_over; "" when there was one."""
    rates: Mapping[str, float]
    """Learning rate by part."""
    norm: float
    """Of the gradient, before clipping."""
    seconds: float
    waited_seconds: float
    """For images, on the rank that waited longest."""

    @property
    def keys(self) -> list[str]:
        """Every key that was planned for the step."""
        return [sample.key for micro_batch in self.step.micro_batches for sample in micro_batch.samples]

    @property
    def not_finite_keys(self) -> list[str]:
        """The images whose own loss was not finite."""
        return [result.key for result in self.results if not math.isfinite(result.loss)]

    @property
    def weighted_loss(self) -> float | None:
        """Its mean over the images; None when there are none."""
        return sum(result.weighted_loss for result in self.results) / len(self.results) if self.results else None

    def metrics(self) -> dict[str, Any]:
        """Return the row of metrics.jsonl. `global_step` counts finished steps from 1, `step` is its plan's, from 0.

        Sums run in plan order in double precision, so that they do not depend on the number of ranks. A value that is
        not finite is left out: JSON has no word for it.
        """
        count = max(len(self.results), 1)
        values = {
            "train/grad_norm": self.norm,
            "train/images_seen": self.after.images_seen,
            "speed/images_per_second": len(self.results) / max(self.seconds, 1e-9),
            "speed/step_seconds": self.seconds,
            "data/wait_seconds": self.waited_seconds,
            "data/wait_fraction": self.waited_seconds / max(self.seconds, 1e-9),
            **{f"lr/{part}": rate for part, rate in self.rates.items()},
        }
        if self.weighted_loss is not None:
            values["train/loss"] = sum(result.loss for result in self.results) / count
            values["train/weighted_loss"] = self.weighted_loss
        buckets = self._bucket_of_key()
        values |= _mean_by(((result.dataset, result.loss) for result in self.results), "loss_by_dataset/")
        values |= _mean_by(((buckets[result.key], result.loss) for result in self.results), "loss_by_bucket/")
        with_timestep = [result for result in self.results if "timestep" in result.scalars]
        values |= mean_by_band(((r.scalars["timestep"], r.loss) for r in with_timestep), "loss_by_timestep/")
        for name in self.results[0].scalars if self.results else ():
            values[f"sample_mean/{name}"] = sum(result.scalars[name] for result in self.results) / count
        place = {
            "global_step": self.after.global_step,
            "chunk": self.after.chunk,
            "epoch": self.after.epoch,
            "step": self.before.step,
        }
        counts = {"data/broken": len(self.broken), "train/skipped": int(bool(self.problem))}
        return place | {name: value for name, value in values.items() if math.isfinite(value)} | counts

    def _bucket_of_key(self) -> dict[str, str]:
        planned = self.step.micro_batches
        return {sample.key: str(micro_batch.bucket) for micro_batch in planned for sample in micro_batch.samples}

    def trace(self) -> dict[str, Any]:
        """Return what was trained: equal for an interrupted and an uninterrupted run, on any number of ranks."""
        planned = [
            [micro_batch.bucket.width, micro_batch.bucket.height, [sample.key for sample in micro_batch.samples]]
            for micro_batch in self.step.micro_batches
        ]
        return {
            "global_step": self.after.global_step,
            "chunk": self.before.chunk,
            "epoch": self.before.epoch,
            "step": self.before.step,
            "planned": planned,
            "samples": [
                [
                    result.key,
                    result.caption,
                    {name: _json(value) for name, value in result.scalars.items()},
                    _json(result.loss),
                ]
                for result in self.results
            ],
            "rates": dict(self.rates),
        }

    def log_line(self, plan: BatchPlan) -> str:
        """Return the step in one line, with the time that is left for the epoch at this step's speed.

        The rate is the network's, or that of the first part where it is not trained.
        """
        metrics, left_seconds = self.metrics(), (len(plan.steps) - self.after.step) * self.seconds
        rate = self.rates.get("network", next(iter(self.rates.values()), math.nan))
        return (
            f"{self.after.chunk} step {self.after.step:,} of {len(plan.steps):,}  global {self.after.global_step:,}  "
            f"images {self.after.images_seen:,}  loss {metrics.get('train/loss', math.nan):.4f}  "
            f"lr {rate:.1e}  {metrics['speed/images_per_second']:.2f} img/s  "
            f"data {metrics['data/wait_fraction']:.0%}  eta {left_seconds // 60:.0f}m{left_seconds % 60:02.0f}s"
        )


def _mean_by(losses: Iterable[tuple[str, float]], prefix: str) -> dict[str, float]:
    """Return the mean loss under each name. losses: (name, loss)."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, loss in losses:
        by_name[name].append(loss)
    return {prefix + name: sum(by_name[name]) / len(by_name[name]) for name in sorted(by_name)}


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)  # "nan": JSON has no word for it
