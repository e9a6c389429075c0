"""What rank 0 adds to a step's row of metrics.jsonl: progress, time left, memory, the loss's average, spikes.

What a spike is, every rank knows (`training.spikes`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from training.campaign import Campaign, is_done
from training.loss_window import LossWindow
from training.position import Position
from training.step_report import StepReport


@dataclass(frozen=True)
class Progress:
    """Images of a run around one chunk; showings, over all epochs."""

    planned: int
    """In this chunk."""
    before: int
    """In chunks that are done."""
    after: int
    """In chunks that are neither. An estimate: as many showings per sample as this chunk has."""
    busy_seconds_before: float
    """Of the chunks that are done."""

    def metrics(self, position: Position) -> dict[str, float]:
        """Return shares of chunk and campaign, and the hours left at the run's busy seconds per image so far."""
        done = position.chunk_images_trained + position.chunk_images_skipped + position.chunk_images_broken
        everywhere, total = self.before + done, self.before + self.planned + self.after
        seconds_per_image = (self.busy_seconds_before + position.chunk_busy_seconds) / max(everywhere, 1)
        return {
            "progress/chunk_fraction": done / self.planned,
            "progress/campaign_fraction": everywhere / total,
            "progress/campaign_left_hours": (total - everywhere) * seconds_per_image / 3600,
        }


def progress_of(campaign: Campaign, chunk: str, *, num_samples: int, images_planned: int) -> Progress:
    """Return the progress around `chunk`, of num_samples in its index and images_planned showings in all epochs."""
    done = [campaign.records[name] for name in campaign.names if name != chunk and is_done(name, campaign.records)]
    to_come = [
        campaign.chunks[name].info.num_samples
        for name in campaign.chunks
        if name != chunk and not is_done(name, campaign.records)
    ]
    return Progress(
        planned=images_planned,
        before=sum(record.images_planned for record in done),
        after=round(sum(to_come) * images_planned / max(num_samples, 1)),
        busy_seconds_before=sum(record.seconds for record in done),
    )


class Gauges:
    """See the module. progress: of the chunk under way; whoever starts one sets it."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.go_on_after(())

    def go_on_after(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Forget the losses so far and take those of `rows`: the steps of metrics.jsonl before the next one."""
        rows = list(rows)
        self._losses = LossWindow(row.get("train/loss", math.nan) for row in rows)
        self._weighted = LossWindow(row.get("train/weighted_loss", math.nan) for row in rows)

    @property
    def weighted_losses(self) -> list[float]:
        """Of the last 100 steps, in order: what the next step's is judged by."""
        return self._weighted.losses

    def read(self, report: StepReport, metrics: Mapping[str, Any], *, is_spike: bool = False) -> dict[str, float]:
        """Return what belongs into the row `metrics` of a finished step."""
        found = memory_metrics()
        if self.progress is not None:
            found |= self.progress.metrics(report.after)
        if "train/loss" in metrics:
            found["train/spike"] = int(is_spike)
            self._losses.add(metrics["train/loss"])
            found["train/loss_average"] = self._losses.mean
        self._weighted.add(metrics.get("train/weighted_loss", math.nan))
        return found


def memory_metrics() -> dict[str, float]:
    """Return the memory of this process, and the most that its GPU held since the start."""
    found = {"memory/rss_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        found["memory/cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
        found["memory/cuda_reserved_bytes"] = torch.cuda.memory_reserved()
    return found
