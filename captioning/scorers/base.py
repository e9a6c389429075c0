"""What every scorer stores: one raw number per key, higher is better, and whether it could be had.

Words are made of scores by a policy (`tiers`), never here.
"""

from collections.abc import Iterable

import numpy as np

from captioning.plugin import NOT_FINITE, OK, Row, empty_row
from sharding.schema import SCORES


def score_rows(scores: Iterable[float]) -> list[Row]:
    """Return schema.SCORES rows without keys; a score that is not finite becomes status `not_finite`."""
    values = np.asarray(list(scores), dtype=np.float32)
    return [
        {"score": float(value), "status": OK} if np.isfinite(value) else empty_row(SCORES, NOT_FINITE)
        for value in values
    ]
