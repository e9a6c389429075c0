"""What every scorer stores: one raw number per key, higher is better, and whether it could be had.

Words are made of scores by a policy (`tiers`), never here.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from captioning.plugin import OK, ImageModel, ModelError, Row

NOT_FINITE = "not_finite"


class Scorer(ImageModel, Protocol):
    """An image model whose rows are schema.SCORES rows without keys."""


def score_rows(scores: Iterable[float]) -> list[Row]:
    """Return schema.SCORES rows; a score that is not finite becomes status `not_finite` without a score.

    NaN compares false with every threshold: unmarked, it would land in the worst tier.
    """
    values: npt.NDArray[np.float32] = np.asarray(list(scores), dtype=np.float32)
    return [
        {"score": float(value), "status": OK} if np.isfinite(value) else empty_score_row(NOT_FINITE) for value in values
    ]


def empty_score_row(status: str) -> Row:
    """Return a row that says why there is no score."""
    return {"score": None, "status": status}


def read_processor(folder: Path) -> dict[str, Any]:
    """Read `preprocessor_config.json`. Raises ModelError when it is missing or not JSON."""
    path = folder / "preprocessor_config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; mean, standard deviation and size must come from the model") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    return values


def normalise(
    batch: npt.NDArray[np.uint8], *, mean: npt.NDArray[np.float32], std: npt.NDArray[np.float32], scale: float
) -> npt.NDArray[np.float32]:
    """Return (N, 3, H, W) float32 = (x · scale − mean) / std; batch: (N, H, W, 3) uint8 RGB."""
    values = (batch * np.float64(scale)).astype(np.float32)
    return np.ascontiguousarray(((values - mean) / std).transpose(0, 3, 1, 2))
