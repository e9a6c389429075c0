"""Ten bands of the timestep, by which losses are charted: their mean hides most of what changes. No torch."""

import math
from collections import defaultdict
from collections.abc import Iterable

NUM_BANDS = 10


def band_of(timestep: float) -> int:
    """Return the band, 0 … 9, of a timestep in [0, 1]: 0 is next to the picture, 9 next to pure noise."""
    return min(max(int(timestep * NUM_BANDS), 0), NUM_BANDS - 1)


def band_name(band: int) -> str:
    """Return a band's name; names sort as the bands do: `0.0-0.1`."""
    return f"{band / NUM_BANDS:.1f}-{(band + 1) / NUM_BANDS:.1f}"


def centre(band: int) -> float:
    """Return the timestep in the middle of a band."""
    return (band + 0.5) / NUM_BANDS


def mean_by_band(losses: Iterable[tuple[float, float]], prefix: str) -> dict[str, float]:
    """Return the mean loss of each band that has one, under `prefix` and its name. losses: (timestep, loss)."""
    by_band: dict[int, list[float]] = defaultdict(list)
    for timestep, loss in losses:
        by_band[band_of(timestep)].append(loss)
    return {prefix + band_name(band): math.fsum(by_band[band]) / len(by_band[band]) for band in sorted(by_band)}
