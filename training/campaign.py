"""The chunks of a run in order, which is next, and the status table. Reads only files; no torch."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from sharding.chunk import Chunk, ChunkError, list_chunks
from sharding.schema import Workspace
from training.ledger import ChunkRecord


@dataclass(frozen=True)
class StatusRow:
    """Chunks or images of one data set."""

    name: str
    done: int
    remaining: int


def campaign_chunks(workspace: Path, patterns: Sequence[str]) -> list[Chunk]:
    """Return the workspace's chunks that match, pattern by pattern, each pattern's sorted by name, none twice.

    Raises ChunkError when a pattern matches nothing.
    """
    available = {chunk.name: chunk for chunk in list_chunks(Workspace(workspace).chunks)}
    chosen: dict[str, Chunk] = {}
    for pattern in patterns:
        names = sorted(fnmatch.filter(available, pattern))
        if not names:
            there = ", ".join(sorted(available)[:5]) or "no chunks at all"
            raise ChunkError(f"data.chunks: {pattern!r} matches no chunk in {workspace}; there are {there}")
        chosen.update({name: available[name] for name in names if name not in chosen})
    return list(chosen.values())


def next_chunk(names: Sequence[str], records: Mapping[str, ChunkRecord]) -> str | None:
    """Return the first chunk of the campaign that is not done, or None when all are."""
    return next((name for name in names if not is_done(name, records)), None)


def is_done(name: str, records: Mapping[str, ChunkRecord]) -> bool:
    """Tell whether the ledger says that a chunk is trained."""
    return name in records and records[name].status == "done"


def require_in_campaign(name: str, names: Sequence[str]) -> None:
    """Raise ChunkError if the run has no such chunk."""
    if name not in names:
        raise ChunkError(f"chunk {name}: not in this run's data.chunks; there are {', '.join(names[:5])} …")


def require_parent_done(name: str, names: Sequence[str], records: Mapping[str, ChunkRecord]) -> None:
    """Raise ChunkError if `name` is not in the campaign or a chunk before it is not done."""
    require_in_campaign(name, names)
    before = list(names[: names.index(name)])
    if missing := [parent for parent in before if not is_done(parent, records)]:
        raise ChunkError(f"chunk {name}: {missing[0]} comes before it and is not complete in this run; train it first")


def chunk_rows(names: Sequence[str], records: Mapping[str, ChunkRecord]) -> list[StatusRow]:
    """Count chunks by the folder they are in: the model card's "Training Status", with sums that add up."""
    counts: dict[str, list[int]] = {}
    for name in names:
        counts.setdefault(name.split("/")[0], [0, 0])[0 if is_done(name, records) else 1] += 1
    return [StatusRow(name, done, remaining) for name, (done, remaining) in counts.items()]


def image_rows(chunks: Sequence[Chunk], records: Mapping[str, ChunkRecord]) -> list[StatusRow]:
    """Count images by the data set they come from; a chunk that is under way counts as remaining."""
    counts: dict[str, list[int]] = {}
    for chunk in chunks:
        column = 0 if is_done(chunk.name, records) else 1
        for entry in pc.value_counts(chunk.read_index().column("dataset")).to_pylist():
            counts.setdefault(entry["values"], [0, 0])[column] += entry["counts"]
    return [StatusRow(name, done, remaining) for name, (done, remaining) in sorted(counts.items())]


def render_rows(title: str, unit: str, rows: Sequence[StatusRow]) -> str:
    """Return a Markdown table in the form of the seed's model card: data set | training done | remaining."""
    total = StatusRow("**Total**", sum(row.done for row in rows), sum(row.remaining for row in rows))
    cells = [(title, "training done", "remaining"), ("---", "---", "---")]
    cells += [(row.name, f"{row.done:,}", f"{row.remaining:,}") for row in [*rows, total]]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = [
        f"| {name.ljust(widths[0])} | {done.rjust(widths[1])} | {remaining.rjust(widths[2])} |"
        for name, done, remaining in cells
    ]
    lines[1] = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([*lines, f"({unit}; {total.done:,} + {total.remaining:,} = {total.done + total.remaining:,})"])
