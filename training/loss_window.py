"""The losses of the last 100 steps: their mean for a smooth curve, their median to see a spike. No torch.

A function of the losses alone, which are the same on all ranks: so is every answer.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 100
MIN_LOSSES = 20
"""Fewer say too little about how far losses usually lie apart."""
_SIGMA_PER_MAD = 1.4826
"""Of a normal distribution: Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", 1993."""


class LossWindow:
    """Takes one loss a step; those that are no finite numbers are left out. losses: of earlier steps, in order."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def add(self, loss: float) -> None:
        """Take in the loss of the step just done."""
        if math.isfinite(loss):
            self._losses.append(loss)

    @property
    def losses(self) -> list[float]:
        """Those of the window, in order."""
        return list(self._losses)

    @property
    def mean(self) -> float:
        """Mean of the window; NaN before the first loss."""
        return math.fsum(self._losses) / len(self._losses) if self._losses else math.nan

    @property
    def median(self) -> float:
        """Median of the window; NaN before the first loss."""
        return statistics.median(self._losses) if self._losses else math.nan

    def spike_size(self, loss: float) -> float:
        """Return how many robust standard deviations a new loss lies above the median of those before it.

        The deviation is 1.4826 × the median absolute deviation, at least a thousandth of the median. 0 while there are
        fewer than 20 losses, and for one that is no finite number: that is the finite check's. Spikes stay in the
        window, so that a lasting change is one for about 50 steps and then no more.
        """
        if len(self._losses) < MIN_LOSSES or not math.isfinite(loss):
            return 0.0
        median = self.median
        mad = statistics.median(abs(earlier - median) for earlier in self._losses)
        return (loss - median) / max(_SIGMA_PER_MAD * mad, abs(median) / 1000, 1e-12)
