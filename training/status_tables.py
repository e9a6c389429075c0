"""The tables of `training status`: chunks and images done and remaining, with sums that add up. No torch.

A chunk that the run has finished is counted by complete.json; of others three columns of the index are read, once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.chunk import Chunk, ChunkError
from training.campaign import Campaign
from training.run_dir import RunDir

PERIODS = ("newest", "recent", "mid", "early", "oldest")
_NO_PERIOD = "(no date)"


@dataclass(frozen=True)
class StatusRow:
    """Chunks or images of one data set or period. A chunk that is under way is remaining."""

    name: str
    done: int
    remaining: int

    @property
    def total(self) -> int:
        return self.done + self.remaining


@dataclass(frozen=True)
class ChunkCounts:
    """What is in a chunk: images by data set and by period, and showings of one epoch (repeats summed)."""

    datasets: Mapping[str, int]
    periods: Mapping[str, int]
    showings: int


def count_images(chunk: Chunk) -> ChunkCounts:
    """Count a chunk's index. Raises ChunkError when it cannot be read."""
    try:
        table = pq.read_table(chunk.index_path, columns=["dataset", "period", "repeats"], partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ChunkError(f"{chunk.index_path}: cannot be read ({error}); run `python -m sharding verify`") from error
    return ChunkCounts(
        _counts(table.column("dataset")), _counts(table.column("period")), pc.sum(table.column("repeats")).as_py() or 0
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"] or _NO_PERIOD: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def campaign_counts(campaign: Campaign, run_dir: RunDir) -> dict[str, ChunkCounts]:
    """Return what is in each chunk of the run, in its order: the run's copy of an index counts, where it has one."""
    counts = {}
    for name in campaign.names:
        known = (run_dir.read_complete(name) or {}).get("counts")
        if known is not None:
            counts[name] = ChunkCounts(**known)
        else:
            counts[name] = count_images(run_dir.started_chunk(name, check_shards=False) or campaign.chunk(name))
    return counts


def chunk_rows(campaign: Campaign) -> list[StatusRow]:
    """Count chunks by the folder they are in, in the order of the run."""
    return _rows(campaign, {name: {name.split("/")[0]: 1} for name in campaign.names})


def dataset_rows(campaign: Campaign, counts: Mapping[str, ChunkCounts]) -> list[StatusRow]:
    """Count images by the data set they come from."""
    return sorted(_rows(campaign, {name: one.datasets for name, one in counts.items()}), key=lambda row: row.name)


def period_rows(campaign: Campaign, counts: Mapping[str, ChunkCounts]) -> list[StatusRow]:
    """Count images by period, the newest first."""
    rows = _rows(campaign, {name: one.periods for name, one in counts.items()})
    order = {name: number for number, name in enumerate(PERIODS)}
    return sorted(rows, key=lambda row: (order.get(row.name, len(order)), row.name))


def _rows(campaign: Campaign, counts: Mapping[str, Mapping[str, int]]) -> list[StatusRow]:
    sums: dict[str, list[int]] = {}
    for chunk, by_name in counts.items():
        column = 0 if campaign.is_done(chunk) else 1
        for name, count in by_name.items():
            sums.setdefault(name, [0, 0])[column] += count
    return [StatusRow(name, done, remaining) for name, (done, remaining) in sums.items()]


def render_rows(title: str, unit: str, rows: Sequence[StatusRow]) -> str:
    """Return a Markdown table in the form of the seed's model card: name | training done | remaining | total."""
    sums = StatusRow("**Total**", sum(row.done for row in rows), sum(row.remaining for row in rows))
    cells: list[tuple[str, ...]] = [(title, "training done", "remaining", f"total {unit}"), ("---",) * 4]
    cells += [(row.name, *(f"{count:,}" for count in (row.done, row.remaining, row.total))) for row in [*rows, sums]]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells]
    lines[1] = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join(lines)
