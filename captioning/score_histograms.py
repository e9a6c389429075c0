"""How a scorer's scores are spread, with the edges of a policy's tiers. `histogram_drawing` draws it.

Two passes over one column, part by part: the range, then the counts. Nothing is written here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.config import CaptioningConfig
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part

MAX_BINS = 60


@dataclass(frozen=True)
class Edge:
    """A threshold of the policy and the word from there upwards."""

    value: float
    word: str


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of scores in steps: `counts[i]` is of low + i * step up to, not including, the next."""

    model: str
    low: float
    step: float
    counts: tuple[int, ...]
    num_missing: int
    """Rows without a score."""
    minimum: float
    mean: float
    maximum: float
    edges: tuple[Edge, ...]

    @property
    def num_scores(self) -> int:
        return sum(self.counts)


def score_histograms(
    config: CaptioningConfig, workspace: Workspace, *, policy: str, scorers: Sequence[str]
) -> list[ScoreHistogram]:
    """Return a histogram of each scorer that has annotations with scores."""
    found = (_histogram(workspace, model, policy_edges(config, policy, model)) for model in scorers)
    return [histogram for histogram in found if histogram is not None]


def policy_edges(config: CaptioningConfig, policy: str, model: str) -> tuple[Edge, ...]:
    """Return where the words of a policy change by this scorer, the lowest first."""
    rules = config.policies[policy]
    edges = [Edge(it, word) for table in rules.tiers.values() if table.model == model for it, word in table.steps]
    if rules.date.model == model:
        edges += [Edge(float(first), name) for name, (first, _) in config.periods.items()]
    return tuple(sorted(edges, key=lambda edge: edge.value))


def _histogram(workspace: Workspace, model: str, edges: tuple[Edge, ...]) -> ScoreHistogram | None:
    parts = list_parts(workspace.annotations(model))
    num_scores, num_missing, total, low, high, is_whole = 0, 0, 0.0, math.inf, -math.inf, True
    for part in parts:
        scores, missing = _scores(read_part(part, ["score", "status"]))
        num_missing += missing
        if len(scores):
            num_scores, total = num_scores + len(scores), total + float(scores.sum())
            low, high = min(low, float(scores.min())), max(high, float(scores.max()))
            is_whole = is_whole and bool((scores == np.floor(scores)).all())
    if not num_scores:
        return None
    start, step, num_bins = nice_bins(low, high, is_whole=is_whole)
    counts = np.zeros(num_bins, np.int64)
    for part in parts:
        scores, _ = _scores(read_part(part, ["score", "status"]))
        # Some score lies exactly on a border; a billionth of a step keeps it from falling below by rounding.
        places = np.clip(np.floor((scores - start) / step + 1e-6).astype(np.int64), 0, num_bins - 1)
        counts += np.bincount(places, minlength=num_bins)
    return ScoreHistogram(model, start, step, tuple(counts.tolist()), num_missing, low, total / num_scores, high, edges)


def _scores(table: pa.Table) -> tuple[npt.NDArray[np.float64], int]:
    column = table.filter(pc.equal(table.column("status"), "ok")).column("score")
    scores = np.asarray(pc.fill_null(column, float("nan")), dtype=np.float64)
    scores = scores[np.isfinite(scores)]
    return scores, len(table) - len(scores)


def nice_bins(low: float, high: float, *, is_whole: bool) -> tuple[float, float, int]:
    """Return (start, step, number) of at most MAX_BINS bins with round borders that hold low … high."""
    if low >= 0 and high <= 1 and not is_whole:
        return 0.0, 0.02, 50
    span = max(high - low, abs(high) * 1e-6, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / MAX_BINS))
    steps = [power * factor for factor in (1, 2, 5, 10, 20, 50)]
    if is_whole:
        steps = [step for step in [1.0, *steps] if step >= 1]
    for step in steps:
        start = math.floor(low / step) * step
        num_bins = max(math.floor((high - start) / step) + 1, 1)  # rounding may put start a hair above low
        if num_bins <= MAX_BINS:
            return start, step, num_bins
    raise AssertionError(f"no bins for {low} … {high}")
