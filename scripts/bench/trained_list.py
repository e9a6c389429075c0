"""Compare what two runs trained, step by step, from their trace.jsonl: what must be equal, and how far losses are."""

from collections.abc import Sequence
from typing import Any


def is_same_list(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> bool:
    """Tell whether steps, keys, captions, timesteps and rates are equal, in order."""
    return [_without_losses(row) for row in rows] == [_without_losses(row) for row in expected]


def loss_differences(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> list[float]:
    """Return per step the largest relative difference between losses of the same sample. The lists must be the same."""
    return [
        max(abs(one - other) / abs(other) for one, other in zip(_losses(row), _losses(wanted), strict=True))
        for row, wanted in zip(rows, expected, strict=True)
    ]


def _without_losses(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "samples": [sample[:3] for sample in row["samples"]]}


def _losses(row: dict[str, Any]) -> list[float]:
    return [float(sample[3]) for sample in row["samples"]]
