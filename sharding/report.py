"""Account for every file of a workspace: `python -m sharding report DATASET.toml`.

Each listed file is counted exactly once: packed, dropped (by the first stage that dropped it) or waiting for a
stage. Reads tables and indexes, no pixels; writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sharding.chunk import Chunk, list_chunks
from sharding.config import DatasetConfig
from sharding.schema import DROPS, LISTING, MANIFEST, PLAN, Workspace
from sharding.tables import list_parts, query

STAGES = ("scan", "dedupe", "plan", "pack")


@dataclass(frozen=True)
class SourceCount:
    """What became of the files of a source."""

    name: str
    num_files: int
    num_bytes: int
    num_packed: int
    num_dropped: int
    num_waiting: int


@dataclass(frozen=True)
class StageCount:
    """Files that a stage dropped for a reason, or (reason "") that wait for the stage."""

    stage: str
    reason: str
    num_files: int


@dataclass(frozen=True)
class DatasetCount:
    """A dataset as planned and as packed."""

    name: str
    num_images: int
    num_chunks: int
    num_packed_images: int
    num_packed_chunks: int
    num_bytes: int
    """Of its tars."""


@dataclass(frozen=True)
class FormatCount:
    """Kept files of one format."""

    name: str
    num_files: int
    num_bytes: int
    num_pass_through: int


@dataclass(frozen=True)
class PixelCount:
    """Pixels (width × height) of the kept files."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Report:
    """The account of a workspace."""

    name: str
    sources: tuple[SourceCount, ...]
    drops: tuple[StageCount, ...]
    waiting: tuple[StageCount, ...]
    datasets: tuple[DatasetCount, ...]
    periods: dict[str, int]
    """Planned images by period; "" has no date or none that a period holds."""
    formats: tuple[FormatCount, ...]
    pixels: PixelCount
    num_combined_chunks: int
    num_unlisted_packed: int
    """Packed samples whose file is in no listing."""

    @property
    def num_files(self) -> int:
        return sum(source.num_files for source in self.sources)

    @property
    def num_packed(self) -> int:
        return sum(source.num_packed for source in self.sources)

    @property
    def num_dropped(self) -> int:
        return sum(drop.num_files for drop in self.drops)

    @property
    def num_waiting(self) -> int:
        return sum(stage.num_files for stage in self.waiting)

    @property
    def adds_up(self) -> bool:
        """Whether packed, dropped and waiting files sum to the listed ones."""
        return self.num_files == self.num_packed + self.num_dropped + self.num_waiting

    @property
    def account(self) -> str:
        """The sum in words: `60 files = 48 packed + 12 dropped`."""
        waiting = f" + {self.num_waiting:,} waiting" if self.num_waiting else ""
        sign = "=" if self.adds_up else "≠"
        return f"{self.num_files:,} files {sign} {self.num_packed:,} packed + {self.num_dropped:,} dropped{waiting}"

    def summary(self) -> str:
        return render_text(self)


def make_report(config: DatasetConfig, workspace: Workspace) -> Report:
    """Read every table and count. A stage that has not run has counted nothing; its files wait for it."""
    chunks = list_chunks(workspace.chunks)
    plain = [chunk for chunk in chunks if not chunk.info.is_combined]
    outcomes = _outcomes(workspace, plain)
    sources: dict[str, dict[str, int]] = {}
    drops: dict[tuple[str, str], int] = {}
    waiting: dict[str, int] = {}
    num_unlisted = 0
    for row in outcomes:
        count, stage = row["num_files"], row["stage"]
        if not row["is_listed"]:
            num_unlisted += count
            continue
        sums = sources.setdefault(row["source"], {"files": 0, "bytes": 0, "packed": 0, "dropped": 0, "waiting": 0})
        sums["files"] += count
        sums["bytes"] += row["num_bytes"]
        sums[row["outcome"]] += count
        if row["outcome"] == "dropped":
            drops[stage, row["reason"]] = drops.get((stage, row["reason"]), 0) + count
        elif row["outcome"] == "waiting":
            waiting[stage] = waiting.get(stage, 0) + count
    return Report(
        name=config.name,
        sources=tuple(SourceCount(name, *sums.values()) for name, sums in sorted(sources.items())),
        drops=tuple(
            StageCount(stage, reason, count)
            for (stage, reason), count in sorted(drops.items(), key=lambda item: (STAGES.index(item[0][0]), item[0][1]))
        ),
        waiting=tuple(StageCount(stage, "", waiting[stage]) for stage in STAGES if stage in waiting),
        datasets=_datasets(workspace, plain),
        periods={row["period"]: row["n"] for row in _planned(workspace, "period, count(*) as n", "period")},
        formats=_formats(workspace),
        pixels=_pixels(workspace),
        num_combined_chunks=len(chunks) - len(plain),
        num_unlisted_packed=num_unlisted,
    )


def render_text(report: Report) -> str:
    """Return the report as text: the account first, then its tables."""
    lines = [f"{report.name}: {report.account}"]
    if not report.adds_up:
        lines.append("the sums do not add up: this is a mistake of the program, please report it with `--json`")
    if report.num_unlisted_packed:
        lines.append(f"besides, {report.num_unlisted_packed:,} packed samples come from files that are not listed now")
    lines += _table(
        ["source", "files", "size", "packed", "dropped", "waiting"],
        [
            [s.name, f"{s.num_files:,}", _size(s.num_bytes), f"{s.num_packed:,}", f"{s.num_dropped:,}",
             f"{s.num_waiting:,}"]
            for s in report.sources
        ],
    )  # fmt: skip
    lines += _table(["dropped by", "reason", "files"], [[d.stage, d.reason, f"{d.num_files:,}"] for d in report.drops])
    lines += _table(["waiting for", "files"], [[stage.stage, f"{stage.num_files:,}"] for stage in report.waiting])
    total = [
        "total",
        f"{sum(d.num_images for d in report.datasets):,}",
        f"{sum(d.num_chunks for d in report.datasets):,}",
        f"{sum(d.num_packed_images for d in report.datasets):,}",
        f"{sum(d.num_packed_chunks for d in report.datasets):,}",
        _size(sum(d.num_bytes for d in report.datasets)),
    ]
    lines += _table(
        ["dataset", "total images", "total chunk", "packed images", "packed chunk", "size"],
        [
            [d.name, f"{d.num_images:,}", f"{d.num_chunks:,}", f"{d.num_packed_images:,}", f"{d.num_packed_chunks:,}",
             _size(d.num_bytes)]
            for d in report.datasets
        ]
        + ([total] if report.datasets else []),
    )  # fmt: skip
    if report.num_combined_chunks:
        lines.append(f"and {report.num_combined_chunks:,} combined chunks of the same images")
    lines += _table(["period", "images"], [[name or "(none)", f"{n:,}"] for name, n in report.periods.items()])
    lines += _table(
        ["format", "kept files", "size", "unchanged"],
        [[f.name, f"{f.num_files:,}", _size(f.num_bytes), f"{f.num_pass_through:,}"] for f in report.formats],
    )
    if report.formats:
        pixels = report.pixels
        lines += ["", f"pixels: smallest {pixels.smallest:,}, median {pixels.median:,}, largest {pixels.largest:,}"]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        return "  ".join(cells).rstrip()

    return ["", line(head), *(line(row) for row in rows)]


# --- questions to the tables ---


def _outcomes(workspace: Workspace, plain: Sequence[Chunk]) -> list[dict[str, Any]]:
    """Return (source, outcome, stage, reason, is_listed, num_files, num_bytes), every file in exactly one row.

    A file's outcome is the first of: packed, dropped at scan, dedupe, plan, pack, waiting for the earliest stage that
    has not seen it. Of several files with a packed key, the kept one is the packed one.
    """
    indexes = [chunk.index_path for chunk in plain]
    listing = _from(list_parts(workspace.listing), LISTING)
    manifest = _from(list_parts(workspace.manifest), MANIFEST)
    if not list_parts(workspace.listing):
        listing = manifest
    rows = query(
        f"""
        with
        scanned as (
            select source, path, any_value(key) as key, any_value(status) as status, any_value(num_bytes) as num_bytes
            from {manifest} group by source, path),
        listed as (select source, path, max(num_bytes) as num_bytes from {listing} group by source, path),
        files as (
            select coalesce(listed.source, scanned.source) as source, coalesce(listed.path, scanned.path) as path,
                coalesce(listed.num_bytes, scanned.num_bytes) as num_bytes, key, status,
                listed.source is not null as is_listed
            from listed full join scanned on listed.source = scanned.source and listed.path = scanned.path),
        kept as (select distinct source, path, key from {_from(list_parts(workspace.kept), MANIFEST)}),
        packed_keys as (select distinct key from {_from(indexes, PLAN)}),
        planned_keys as (select distinct key from {_from(list_parts(workspace.plan), PLAN)}),
        packed as (
            select source, path from (
                select files.source, files.path, row_number() over (
                    partition by files.key
                    order by kept.key is not null desc, files.status = 'kept' desc, files.source, files.path) as place
                from files join packed_keys using (key)
                left join kept on files.source = kept.source and files.path = kept.path and files.key = kept.key)
            where place = 1),
        drops as (
            select source, path, arg_min(reason, place) as reason,
                {_case({str(place): f"'{stage}'" for place, stage in enumerate(STAGES)}, "min(place)")} as stage
            from (
                select source, path, reason,
                    {_case({f"'{stage}'": str(place) for place, stage in enumerate(STAGES)}, "stage")} as place
                from {_from(_drop_parts(workspace), DROPS)})
            where place > 0 group by source, path),
        judged as (
            select files.source, num_bytes, is_listed,
                case when packed.path is not null then 'packed'
                    when files.status <> 'kept' or drops.path is not null then 'dropped'
                    else 'waiting' end as outcome,
                case when packed.path is not null then ''
                    when files.status is null then 'scan'
                    when files.status <> 'kept' then 'scan'
                    when drops.path is not null then drops.stage
                    when kept.path is null then 'dedupe'
                    when planned_keys.key is null then 'plan'
                    else 'pack' end as stage,
                case when packed.path is not null then ''
                    when files.status <> 'kept' then files.status
                    when drops.path is not null then drops.reason
                    else '' end as reason
            from files
            left join packed on files.source = packed.source and files.path = packed.path
            left join drops on files.source = drops.source and files.path = drops.path
            left join kept on files.source = kept.source and files.path = kept.path
            left join planned_keys on files.key = planned_keys.key)
        select source, outcome, stage, reason, is_listed, count(*) as num_files,
            cast(coalesce(sum(num_bytes), 0) as bigint) as num_bytes
        from judged where is_listed or outcome = 'packed'
        group by source, outcome, stage, reason, is_listed order by all
        """
    )
    return _dicts(rows)


def _drop_parts(workspace: Workspace) -> list[Path]:
    folders = [workspace.dedupe / "drops", workspace.plan / "drops"]
    parts = [part for folder in folders for part in list_parts(folder)]
    return parts + sorted(workspace.pack_drops.glob("*.parquet"))


def _case(answers: dict[str, str], value: str) -> str:
    return f"case {value} " + " ".join(f"when {when} then {then}" for when, then in answers.items()) + " end"


def _from(parts: Sequence[Path], schema: pa.Schema) -> str:
    """Return what stands after FROM for some Parquet files; for none, an empty table with the schema's columns."""
    if parts:
        names = ", ".join("'" + str(part).replace("'", "''") + "'" for part in parts)
        return f"read_parquet([{names}], hive_partitioning = false)"
    types = {pa.int64(): "bigint", pa.int32(): "integer", pa.bool_(): "boolean"}
    columns = ", ".join(f'null::{types.get(field.type, "varchar")} as "{field.name}"' for field in schema)
    return f"(select {columns} where false)"


def _dicts(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _planned(workspace: Workspace, columns: str, by: str) -> list[dict[str, Any]]:
    plan = _from(list_parts(workspace.plan), PLAN)
    return _dicts(query(f"select {columns} from {plan} group by {by} order by {by}"))


def _datasets(workspace: Workspace, plain: Sequence[Chunk]) -> tuple[DatasetCount, ...]:
    rows = _planned(workspace, "dataset, count(*) as images, count(distinct chunk) as chunks", "dataset")
    planned = {row["dataset"]: (row["images"], row["chunks"]) for row in rows}
    packed: dict[str, list[Chunk]] = {}
    for chunk in plain:
        packed.setdefault(chunk.folder.parent.name, []).append(chunk)
    return tuple(
        DatasetCount(
            name,
            *planned.get(name, (0, 0)),
            num_packed_images=sum(chunk.info.num_samples for chunk in packed.get(name, [])),
            num_packed_chunks=len(packed.get(name, [])),
            num_bytes=sum(shard.num_bytes for chunk in packed.get(name, []) for shard in chunk.info.shards),
        )
        for name in sorted({*planned, *packed})
    )


def _formats(workspace: Workspace) -> tuple[FormatCount, ...]:
    kept = _from(list_parts(workspace.kept), MANIFEST)
    rows = query(
        f"select format, count(*) as n, cast(sum(num_bytes) as bigint) as b, "
        f"count(*) filter (is_pass_through) as p from {kept} group by format order by n desc, format"
    )
    return tuple(FormatCount(row["format"], row["n"], row["b"], row["p"]) for row in _dicts(rows))


def _pixels(workspace: Workspace) -> PixelCount:
    kept = _from(list_parts(workspace.kept), MANIFEST)
    pixels = "width::bigint * height"
    row = _dicts(
        query(f"select min({pixels}) as a, quantile_disc({pixels}, 0.5) as b, max({pixels}) as c from {kept}")
    )[0]
    return PixelCount(row["a"] or 0, row["b"] or 0, row["c"] or 0)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
