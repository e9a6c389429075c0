"""The showings of a chunk: every sample of the index as often as it is repeated, each with its place in a bucket.
Samples that are shown in some epochs only, as class images are, are left out of the others.

A pure function of the index and the buckets. No torch, no files. In which order they are trained is in `batch_plan`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from training.buckets import BucketError, BucketSettings, Placement, placement
from training.randomness import SampleIdentity


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One showing of one sample. row: row number in the index the plan was made from."""

    row: int
    key: str
    concept: str
    occurrence: int
    """Counts the repeats of a sample, from 0: each has random numbers of its own."""
    loss_weight: float

    def identity(self, *, seed: int, epoch: int, chunk: str) -> SampleIdentity:
        """Return whose random numbers this showing uses."""
        return SampleIdentity(seed, epoch, chunk, self.key, self.concept, self.occurrence)


@dataclass(frozen=True, slots=True)
class PlanDrop:
    """A sample of the index that has no bucket, with a snake_case reason."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Fit:
    """Size of a picture in encoder pixels (stored size × source_scale), and how it gets into its bucket."""

    width: int
    height: int
    placement: Placement


def fit(width: int, height: int, settings: BucketSettings) -> Fit:
    """Return how a picture of width × height stored pixels is fitted. Raises BucketError when it has no bucket."""
    scaled = (max(1, round(width * settings.source_scale)), max(1, round(height * settings.source_scale)))
    return Fit(scaled[0], scaled[1], placement(*scaled, settings=settings))


def fits(index: pa.Table, settings: BucketSettings) -> Mapping[tuple[int, int], Fit | BucketError]:
    """Return the fit of every stored size in the index, by (width, height), or why it has none."""
    sizes = set(zip(*(index.column(side).to_pylist() for side in ("width", "height")), strict=True))
    return {size: fit_or_reason(size[0], size[1], settings) for size in sizes}


@lru_cache(maxsize=1 << 17)
def fit_or_reason(width: int, height: int, settings: BucketSettings) -> Fit | BucketError:
    """Return the fit of a stored size, or why it has none; the chunks of a run share most sizes."""
    try:
        return fit(width, height, settings)
    except BucketError as error:
        return error.with_traceback(None)


def shown_epochs(index: pa.Table, *, chunk: str) -> Iterator[tuple[int, int]]:
    """Yield (every, offset) of each row, which is shown in the epochs e with e % every == offset.

    They are the index's columns every_epochs and epoch_offset; without them every row is shown in all epochs.
    Raises ValueError for numbers that mean no epoch.
    """
    if "every_epochs" not in index.column_names:
        yield from [(1, 0)] * index.num_rows
        return
    names = ("key", "every_epochs", "epoch_offset")
    for key, every, offset in zip(*(index.column(name).to_pylist() for name in names), strict=True):
        if not 0 <= offset < every:
            raise ValueError(
                f"chunk {chunk}: key {key} has every_epochs {every} and epoch_offset {offset}; the offset must be at "
                "least 0 and smaller: pack again"
            )
        yield every, offset


def all_showings(
    index: pa.Table, settings: BucketSettings, *, chunk: str, epoch: int
) -> tuple[dict[PlannedSample, Fit], list[PlanDrop]]:
    """Return every showing of an epoch with its fit, in the index's order, and the samples of the whole index that
    have no bucket, sorted by key.

    index: columns key, width, height, repeats, loss_weight; used when they are there: concept, and every_epochs with
    epoch_offset, which leave a sample out of some epochs (`shown_epochs`).
    Raises ValueError for a key that comes twice, a negative number of repeats, or a loss weight that is not a
    number of at least 0.
    """
    names = ["key", "width", "height", "repeats", "loss_weight"]
    columns = [index.column(name).to_pylist() for name in names]
    concepts = index.column("concept").to_pylist() if "concept" in index.column_names else [""] * index.num_rows
    by_size = fits(index, settings)
    seen: set[tuple[str, str]] = set()
    showings: dict[PlannedSample, Fit] = {}
    drops = []
    rows = zip(*columns, concepts, shown_epochs(index, chunk=chunk), strict=True)
    for row, (key, width, height, repeats, weight, concept, (every, offset)) in enumerate(rows):
        if (key, concept) in seen:
            raise ValueError(
                f"chunk {chunk}: key {key}{f' of concept {concept}' * bool(concept)} stands twice; pack again"
            )
        seen.add((key, concept))
        if repeats < 0 or not 0 <= weight < math.inf:
            raise ValueError(
                f"chunk {chunk}: key {key} has repeats {repeats} and loss_weight {weight}; neither may be negative,"
                " and a weight must be finite: correct what the plan says of it and pack again"
            )
        own = by_size[width, height]
        if isinstance(own, BucketError):
            drops.append(PlanDrop(key, own.reason, own.detail))
            continue
        for occurrence in range(repeats if epoch % every == offset else 0):
            showings[PlannedSample(row, key, concept, occurrence, weight)] = own
    return showings, sorted(drops, key=lambda drop: drop.key)
