"""What the verdict's charts show of each concept, read back from the rows of metrics.jsonl. No torch."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRAINED, HELD_OUT, GAP, PRIOR, NEAREST = (
    "verdict/trained/", "verdict/held_out/", "verdict/gap/", "verdict/prior/", "verdict/nearest/",
)  # fmt: skip
DRIFT = "verdict/sanity_drift"


@dataclass(frozen=True)
class Curve:
    """Values by global step, in order. Values that are not finite are left out."""

    points: tuple[tuple[int, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.points)

    @property
    def first(self) -> float:
        return self.points[0][1]

    @property
    def last(self) -> float:
        return self.points[-1][1]

    @property
    def last_step(self) -> int:
        return self.points[-1][0]

    @property
    def lowest(self) -> tuple[int, float]:
        """(step, value) of the minimum; of equal ones the last."""
        return min(reversed(self.points), key=lambda point: point[1])

    def at(self, step: int) -> float:
        """Return the value at a step, or the last one before it, or the first."""
        place = bisect_right([one for one, _ in self.points], step)
        return self.points[max(place - 1, 0)][1]

    def up_to(self, step: int) -> "Curve":
        return Curve(tuple(point for point in self.points if point[0] <= step))

    def fallen(self, *, since_share: float = 1.0) -> float:
        """Return how far the curve's end lies below all that was before its last share of steps, as a share of the
        first value. Negative where it was lower before: ups and downs are no fall.
        """
        start = self.last_step - since_share * (self.last_step - self.points[0][0])
        before = self.up_to(math.floor(start)) or Curve(self.points[:1])
        return (before.lowest[1] - self.last) / self.first if self.first else 0.0

    def risen(self) -> float:
        """Return how far the last two points lie above the minimum, the lower one of them, as a share of the first."""
        lower = min(value for _, value in self.points[-2:])
        return (lower - self.lowest[1]) / self.first if self.first else 0.0


@dataclass(frozen=True)
class ConceptCurves:
    """The charts of one concept."""

    trained: Curve = field(default_factory=Curve)
    held_out: Curve = field(default_factory=Curve)
    nearest: Curve = field(default_factory=Curve)

    def up_to(self, step: int) -> "ConceptCurves":
        return ConceptCurves(self.trained.up_to(step), self.held_out.up_to(step), self.nearest.up_to(step))


@dataclass(frozen=True)
class Curves:
    """The charts of a run."""

    concepts: Mapping[str, ConceptCurves]
    drift: Curve
    steps: tuple[int, ...]
    """At which something was measured, in order."""

    def up_to(self, step: int) -> "Curves":
        concepts = {name: curves.up_to(step) for name, curves in self.concepts.items()}
        return Curves(concepts, self.drift.up_to(step), tuple(one for one in self.steps if one <= step))


def read_curves(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """Return the curves in rows of metrics.jsonl; of a step that comes twice the last value counts."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("verdict/") and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {})[row["global_step"]] = float(value)
    curves = {name: Curve(tuple(sorted(points.items()))) for name, points in found.items()}
    names = [name.removeprefix(prefix) for prefix in (TRAINED, HELD_OUT) for name in curves if name.startswith(prefix)]
    concepts = {
        name: ConceptCurves(*(curves.get(prefix + name, Curve()) for prefix in (TRAINED, HELD_OUT, NEAREST)))
        for name in sorted(set(names))
    }
    steps = sorted({step for points in found.values() for step in points})
    return Curves(concepts, curves.get(DRIFT, Curve()), tuple(steps))
