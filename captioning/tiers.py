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


def summed_tier_numbers(
    scores: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32], *, comparison: str
) -> npt.NDArray[np.int32]:
    """Return the numbers of tiers by the sum of several scores, as `tier_numbers`.

    scores: (M, N), NaN where there is none; thresholds: (M, K), descending. The sum of the scores that a picture has is
    compared with the sum of just their thresholds, in float64.
    """
    is_there = np.isfinite(scores)
    sums = np.where(is_there, scores, 0).astype(np.float64).sum(axis=0)
    limits = is_there.T.astype(np.float64) @ thresholds.astype(np.float64)
    passed = sums[:, None] > limits if comparison == ">" else sums[:, None] >= limits
    numbers: npt.NDArray[np.int32] = (thresholds.shape[1] - passed.sum(axis=1)).astype(np.int32)
    numbers[~is_there.any(axis=0)] = NO_TIER
    return numbers


def voted_tier_numbers(
    votes: npt.NDArray[np.float32],
    ratings: npt.NDArray[np.int64],
    thresholds: Sequence[Sequence[float]],
    *,
    comparison: str,
) -> npt.NDArray[np.int32]:
    """Return the numbers of tiers by votes, whose thresholds depend on the rating; NO_TIER without one or the other.

    votes: (N,), NaN where there are none. ratings: (N,) position in `thresholds`, -1 where there is none.
    """
    numbers = np.full(len(votes), NO_TIER, dtype=np.int32)
    for rating, table in enumerate(thresholds):
        chosen = ratings == rating
        numbers[chosen] = tier_numbers(votes[chosen], table, comparison=comparison)
    return numbers


def higher_tier(left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the higher of two tiers, which is the lower number; where one is missing the other."""
    both = np.where(right == NO_TIER, left, np.minimum(left, right))
    higher: npt.NDArray[np.int32] = np.where(left == NO_TIER, right, both).astype(np.int32)
    return higher


def passes(
    values: npt.NDArray[np.float32], limits: npt.NDArray[np.float32], *, comparison: str
) -> npt.NDArray[np.bool_]:
    """Return where a probability passes its limit; both (N,) float32."""
    return values > limits if comparison == ">" else values >= limits
