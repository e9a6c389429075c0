"""Losses far above those before them, judged on every rank: losses are the same on all of them, so is the answer.

What follows (a warning, or going back to an earlier state) is not decided here. No torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from training.loss_window import LossWindow
from training.step_report import StepReport


@dataclass(frozen=True)
class Spike:
    """A step's loss that lies far above those before it."""

    loss: float
    """Weighted; the step's mean."""
    median: float
    """Of the steps before it, at most 100."""
    size: float
    """Robust standard deviations above the median."""
    is_first: bool
    """Whether the step before was none."""

    def __str__(self) -> str:
        return (
            f"loss spike: weighted loss {self.loss:.4f}, the median of the last 100 steps is {self.median:.4f} "
            f"({self.size:.1f} robust standard deviations); look at the learning rate, and at the step's pictures"
        )


class SpikeWatch:
    """Takes the steps as they are done. factor: from which size on a loss is a spike, 0 for never.

    losses: the weighted ones of the steps before, in order.
    """

    def __init__(self, *, factor: float, batch_size: int, losses: Iterable[float] = ()) -> None:
        self._factor = factor
        self._batch_size = batch_size
        self._window = LossWindow(losses)
        self._was_spike = False

    def take(self, report: StepReport) -> Spike | None:
        """Judge the weighted loss, which lies closer together than the other, of a step of at least half a batch."""
        loss = report.weighted_loss
        if loss is None:
            return None
        size = self._window.spike_size(loss) if 2 * len(report.results) >= self._batch_size else 0.0
        spike = None
        if 0 < self._factor <= size:
            spike = Spike(loss, self._window.median, size, is_first=not self._was_spike)
        self._was_spike = spike is not None
        self._window.add(loss)
        return spike
