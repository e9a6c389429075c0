"""What planning came to: the seed's table of images and chunks per dataset, and a line for each thing worth knowing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.keys import key_numbers
from sharding.planning.order import places
from sharding.schema import HELD_OUT

_SHOWN_KEYS = 20


@dataclass(frozen=True)
class PlannedDataset:
    """A dataset's row of the seed's table: how many images in how many chunks."""

    name: str
    num_images: int
    num_chunks: int
    num_last_chunk: int
    """Images in its last chunk."""
    num_held_out: int
    """Images in its held-out chunk; not counted in the others."""
    num_exposures: int
    """Images times their repeats: what one epoch shows."""


@dataclass(frozen=True)
class PlanReport:
    """What planning decided."""

    datasets: tuple[PlannedDataset, ...]
    num_new: int
    """Keys that no chunk of the previous plan held."""
    num_removed: int
    """Keys that left a short last chunk because they are not kept any more."""
    num_vanished: int
    """Keys that are not kept any more, but stand in a full or sealed chunk and stay planned."""
    first_vanished: tuple[str, ...]
    num_dropped: dict[str, int]
    """By reason."""
    is_unchanged: bool = False
    """The plan on disk was made from the same kept keys and settings and was left as it is."""
    is_dry_run: bool = False

    @property
    def num_images(self) -> int:
        return sum(dataset.num_images for dataset in self.datasets)

    @property
    def num_chunks(self) -> int:
        return sum(dataset.num_chunks for dataset in self.datasets)

    @property
    def num_held_out(self) -> int:
        return sum(dataset.num_held_out for dataset in self.datasets)

    @property
    def num_exposures(self) -> int:
        return sum(dataset.num_exposures for dataset in self.datasets)

    def summary(self) -> str:
        """Return the table of datasets and one line for each thing worth knowing."""
        width = max([len("dataset"), *(len(dataset.name) for dataset in self.datasets)])
        columns = {"images": 12, "chunks": 7, "in the last": 11}
        columns |= {"held out": 8} if self.num_held_out else {}
        columns |= {"exposures": 12} if self.num_exposures != self.num_images else {}

        def line(name: str, cells: Sequence[int]) -> str:
            named = zip(columns.items(), cells, strict=False)
            return f"{name:{width}}  " + "  ".join(f"{cell:>{space},}" for (_, space), cell in named)

        lines = [f"{'dataset':{width}}  " + "  ".join(f"{name:>{space}}" for name, space in columns.items())]
        for row in self.datasets:
            more = [row.num_held_out] * ("held out" in columns) + [row.num_exposures] * ("exposures" in columns)
            lines.append(line(row.name, [row.num_images, row.num_chunks, row.num_last_chunk, *more]))
        lines.append(line("total", [self.num_images, self.num_chunks]))
        lines.append("the plan is current" if self.is_unchanged else f"{self.num_new:,} new keys planned")
        if self.num_held_out:
            lines.append(f"{self.num_held_out:,} held out for validation")
        if self.num_exposures != self.num_images:
            lines.append(f"{self.num_exposures:,} exposures per epoch with the repeats of [[plan.weights]]")
        lines += [f"{count:,} dropped: {reason}" for reason, count in sorted(self.num_dropped.items())]
        if self.num_removed:
            lines.append(f"{self.num_removed:,} keys are not kept any more and left a short last chunk")
        if self.num_vanished:
            lines.append(
                f"{self.num_vanished:,} keys are not kept any more, but stay in full or trained chunks, "
                f"first {self.first_vanished[0]}"
            )
        if self.is_dry_run:
            lines.append("nothing was written (--dry-run)")
        return "\n".join(lines)


def report_of(
    rows: pa.Table,
    reasons: pa.ChunkedArray,
    previous_keys: np.ndarray[Any, Any],
    current_keys: np.ndarray[Any, Any],
) -> PlanReport:
    """Say what planning came to. reasons: of the drops."""
    keys = key_numbers(rows.column("key"))
    num_removed = int((places(keys, previous_keys) < 0).sum())
    vanished = np.sort(keys[places(current_keys, keys) < 0])
    counts = rows.group_by(["dataset", "chunk"]).aggregate([("key", "count"), ("repeats", "sum")])
    by_dataset: dict[str, dict[int, tuple[int, int]]] = {}
    for row in counts.to_pylist():
        by_dataset.setdefault(row["dataset"], {})[row["chunk"]] = (row["key_count"], row["repeats_sum"])
    return PlanReport(
        datasets=tuple(_planned_dataset(name, sizes) for name, sizes in sorted(by_dataset.items())),
        num_new=len(keys) - (len(previous_keys) - num_removed),
        num_removed=num_removed,
        num_vanished=len(vanished),
        first_vanished=tuple(f"{key:016x}" for key in vanished[:_SHOWN_KEYS].tolist()),
        num_dropped={count["values"]: count["counts"] for count in pc.value_counts(reasons).to_pylist()},
    )


def _planned_dataset(name: str, sizes: dict[int, tuple[int, int]]) -> PlannedDataset:
    """sizes: chunk → (images, exposures)."""
    num_held_out, _ = sizes.pop(HELD_OUT, (0, 0))
    return PlannedDataset(
        name,
        num_images=sum(images for images, _ in sizes.values()),
        num_chunks=len(sizes),
        num_last_chunk=sizes[max(sizes)][0] if sizes else 0,
        num_held_out=num_held_out,
        num_exposures=sum(exposures for _, exposures in sizes.values()),
    )
