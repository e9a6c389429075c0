"""Columns of metrics as curves of a few hundred points: per bin of steps the mean, the least and the most. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.dashboard.metrics_columns import IMAGES, STEP, Columns

NUM_BINS = 600
_DIGITS = 5


def binned(columns: Columns, *, first_step: int = 0, num_bins: int = NUM_BINS) -> dict[str, Any]:
    """Return the curves from `first_step` on, as the page takes them.

    `x` has the middle step and the images seen of each bin; `curves` for each name the lists `mean`, `least`, `most`;
    null: the bin has none. Bins are equally wide in steps, or a step each when there are no more. Values that are not
    finite are left out and counted in `not_finite`. A bin without rows is none. Rows need not be in order.
    """
    steps = columns[STEP]
    chosen = steps >= first_step
    steps = steps[chosen]
    if steps.size == 0:
        return {"x": {"step": [], "images": []}, "curves": {}, "num_rows": 0, "not_finite": {}}
    low, high = steps.min(), steps.max()
    width = max((high - low + 1) / num_bins, 1.0)
    places = np.minimum(((steps - low) / width).astype(np.int64), num_bins - 1)
    used, places = np.unique(places, return_inverse=True)
    names = [name for name in columns if name not in (STEP, IMAGES)]
    curves, not_finite = {}, {}
    for name in names:
        values = columns[name][chosen]
        if np.isfinite(values).any():
            curves[name] = _curve(values, places, used.size)
        if infinite := int(np.isinf(values).sum()):
            not_finite[name] = infinite
    images = _fill(_most(columns[IMAGES][chosen], places, used.size))
    middle = np.bincount(places, weights=steps) / np.bincount(places)
    x = {"step": _rounded(middle, digits=9), "images": _rounded(images, digits=9)}
    return {"x": x, "curves": curves, "num_rows": int(steps.size), "not_finite": not_finite}


def _curve(values: np.ndarray, places: np.ndarray, count: int) -> dict[str, list[float | None]]:
    is_known = np.isfinite(values)
    known, where = values[is_known], places[is_known]
    if (np.diff(where) < 0).any():
        order = np.argsort(where, kind="stable")
        known, where = known[order], where[order]
    there, starts = np.unique(where, return_index=True)
    mean, least, most = (np.full(count, np.nan) for _ in range(3))
    mean[there] = np.add.reduceat(known, starts) / np.diff(np.append(starts, known.size))
    least[there], most[there] = np.minimum.reduceat(known, starts), np.maximum.reduceat(known, starts)
    return {"mean": _rounded(mean), "least": _rounded(least), "most": _rounded(most)}


def _most(values: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    is_known = np.isfinite(values)
    most = np.full(count, np.nan)
    np.fmax.at(most, places[is_known], values[is_known])
    return most


def _fill(values: np.ndarray) -> np.ndarray:
    """Give bins without a value that of the bin before; the first ones 0."""
    filled = np.where(np.isnan(values), 0.0, values)
    return np.maximum.accumulate(filled)


def _rounded(values: np.ndarray, *, digits: int = _DIGITS) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def mean_between(columns: Columns, name: str, spans: Sequence[tuple[int, int]]) -> list[float | None]:
    """Return the mean of `name` over the steps of each span (first exclusive, last inclusive); None without a value."""
    steps, values = columns[STEP], columns[name]
    is_known = np.isfinite(values)
    order = np.argsort(steps[is_known], kind="stable")
    steps, sums = steps[is_known][order], np.concatenate([[0.0], np.cumsum(values[is_known][order])])
    means: list[float | None] = []
    for first, last in spans:
        start, end = np.searchsorted(steps, [first, last], side="right")
        means.append(float(sums[end] - sums[start]) / int(end - start) if end > start else None)
    return means
