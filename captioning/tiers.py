"""Scores → numbers of tiers, by a table of thresholds.

Scores and thresholds are compared as float32, the precision scores are stored in: 0.98 as float32 is a little more
than 0.98 as float64, and "greater than 0.98" must be false for it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NO_TIER = -1


def tier_numbers(
    scores: npt.NDArray[np.float32], thresholds: Sequence[float], *, comparison: str
) -> npt.NDArray[np.int32]:
    """Return for each score the number of the first threshold it passes, len(thresholds) if none, NO_TIER if missing.

    scores: (N,) float32, NaN where there is none. thresholds: descending. comparison: ">" or ">=".
    """
    ascending = np.asarray(list(thresholds)[::-1], dtype=np.float32)
    scores = scores.astype(np.float32, copy=False)
    # Thresholds passed: those < score (strict), or <= score.
    passed = np.searchsorted(ascending, scores, side="left" if comparison == ">" else "right")
    numbers = (len(ascending) - passed).astype(np.int32)
    numbers[~np.isfinite(scores)] = NO_TIER
    return numbers


def passes(
    values: npt.NDArray[np.float32], limits: npt.NDArray[np.float32], *, comparison: str
) -> npt.NDArray[np.bool_]:
    """Return where a probability passes its limit; both (N,) float32."""
    return values > limits if comparison == ">" else values >= limits
