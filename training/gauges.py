"""What rank 0 adds to a step's row of metrics.jsonl: progress, time left, memory, the loss's average, spikes."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from training.campaign import Campaign, is_done
from training.config import RunConfig
from training.loss_window import LossWindow
from training.position import Position
from training.step_report import StepReport

logger = logging.getLogger(__name__)


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

    def __init__(self, config: RunConfig) -> None:
        self.progress: Progress | None = None
        self._spike_factor = config.trackers.spike_factor
        self._batch_size = config.batch.batch_size
        self.go_on_after(())

    def go_on_after(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Forget the losses so far and take those of `rows`: the steps of metrics.jsonl before the next one."""
        with_loss = [row for row in rows if "train/loss" in row]
        self._losses = LossWindow(row["train/loss"] for row in with_loss)
        self._weighted = LossWindow(row["train/weighted_loss"] for row in with_loss)
        self._was_spike = False

    def read(self, report: StepReport, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return what belongs into the row `metrics` of a finished step, and warn of a spike of the loss."""
        found = memory_metrics()
        if self.progress is not None:
            found |= self.progress.metrics(report.after)
        if "train/loss" in metrics:
            found["train/spike"] = int(self._is_spike(report, metrics["train/weighted_loss"]))
            self._losses.add(metrics["train/loss"])
            self._weighted.add(metrics["train/weighted_loss"])
            found["train/loss_average"] = self._losses.mean
        return found

    def _is_spike(self, report: StepReport, loss: float) -> bool:
        """Judge the weighted loss, which lies closer together, of steps of at least half a batch."""
        size = self._weighted.spike_size(loss) if 2 * len(report.results) >= self._batch_size else 0.0
        is_spike = 0 < self._spike_factor <= size
        if is_spike and not self._was_spike:
            logger.warning(
                "%s step %d: loss spike: weighted loss %.4f, the median of the last 100 steps is %.4f (%.1f robust "
                "standard deviations); look at the learning rate, and at the step's pictures",
                report.after.chunk, report.before.step, loss, self._weighted.median, size,
            )  # fmt: skip
        self._was_spike = is_spike
        return is_spike


def memory_metrics() -> dict[str, float]:
    """Return the memory of this process, and the most that its GPU held since the start."""
    found = {"memory/rss_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        found["memory/cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
        found["memory/cuda_reserved_bytes"] = torch.cuda.memory_reserved()
    return found
