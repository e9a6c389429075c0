"""The rows that chunks are made of: plan, kept record and caption joined, some chunks at a time.

Chunks are random samples, so each needs rows of every part. When they do not fit into memory together, one pass over
the parts sorts the rows into temporary Parquet files, one per group of chunks; memory does not grow with the dataset.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.files import TEMPORARY_MARK, remove_temporaries
from sharding.keys import key_numbers
from sharding.packing.jobs import Job
from sharding.planning.order import KeyRows
from sharding.schema import CAPTIONS, MANIFEST, Workspace
from sharding.tables import list_parts, read_part

ROWS_PER_GROUP = 120_000
"""Samples whose records and captions are in memory at once, about 5 kB each."""
_BUFFERED_ROWS = 64_000
"""Rows that wait, over all groups, for being written to the temporary files."""
_A_DAY = 86_400.0
"""Age at which a killed pack's temporary files are certainly not another task's."""
_RECORD_COLUMNS = [name for name in MANIFEST.names if name not in (
    "dataset", "phash", "turned_phashes", "sketch", "local_features", "status", "detail", "mode",
)]  # fmt: skip
_RECORDS = pa.schema([MANIFEST.field(name) for name in _RECORD_COLUMNS])


def jobs_with_rows(
    workspace: Workspace, policy: str, jobs: Sequence[Job], *, rows_per_group: int = ROWS_PER_GROUP
) -> Iterator[Job]:
    """Yield the jobs in order with their `records`; the rows of those in one group are in memory together."""
    groups = _groups(jobs, rows_per_group)
    if len(groups) <= 1:
        for group in groups:
            finder = KeyRows(_keys(group))
            records = _select(workspace.kept, _RECORDS, finder)
            yield from _joined(group, records, _select(workspace.captions(policy), CAPTIONS, finder))
        return
    remove_temporaries(workspace.root, min_age_seconds=_A_DAY)
    with tempfile.TemporaryDirectory(prefix=f"pack-rows{TEMPORARY_MARK}", dir=workspace.root) as temporary:
        records, captions = Path(temporary) / "records", Path(temporary) / "captions"
        _sort_into_groups(workspace.kept, _RECORDS, groups, records)
        _sort_into_groups(workspace.captions(policy), CAPTIONS, groups, captions)
        for number, group in enumerate(groups):
            tables = [pq.read_table(_group_path(folder, number), partitioning=None) for folder in (records, captions)]
            yield from _joined(group, *tables)
            for folder in (records, captions):
                _group_path(folder, number).unlink()


def _groups(jobs: Sequence[Job], rows_per_group: int) -> list[list[Job]]:
    groups: list[list[Job]] = []
    num_rows = rows_per_group
    for job in jobs:
        if num_rows + job.plan.num_rows > rows_per_group or not groups:
            groups.append([])
            num_rows = 0
        groups[-1].append(job)
        num_rows += job.plan.num_rows
    return groups


def _keys(jobs: Sequence[Job]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.concatenate([key_numbers(job.plan.column("key")) for job in jobs])


def _select(folder: Path, schema: pa.Schema, finder: KeyRows) -> pa.Table:
    tables = [schema.empty_table()]
    for part in list_parts(folder):
        table = read_part(part, schema.names)
        is_wanted = finder.of(key_numbers(table.column("key"))) >= 0
        tables.append(table.filter(pa.array(is_wanted)).cast(schema))
    return pa.concat_tables(tables)


def _sort_into_groups(folder: Path, schema: pa.Schema, groups: Sequence[Sequence[Job]], target: Path) -> None:
    """Write one file per group with the rows of its keys, in one pass over the parts of `folder`."""
    target.mkdir()
    finder = KeyRows(_keys([job for group in groups for job in group]))
    ends = np.cumsum([sum(job.plan.num_rows for job in group) for group in groups])
    writers = [
        pq.ParquetWriter(_group_path(target, number), schema, compression="zstd") for number in range(len(groups))
    ]
    buffers: list[list[pa.Table]] = [[] for _ in groups]
    num_buffered = 0

    def flush() -> None:
        for writer, tables in zip(writers, buffers, strict=True):
            if tables:
                writer.write_table(pa.concat_tables(tables).combine_chunks())
            tables.clear()

    try:
        for part in list_parts(folder):
            table = read_part(part, schema.names)
            rows = finder.of(key_numbers(table.column("key")))
            group_of_row = np.where(rows >= 0, np.searchsorted(ends, rows, side="right"), len(groups))
            order = np.argsort(group_of_row, kind="stable")
            bounds = np.searchsorted(group_of_row[order], np.arange(len(groups) + 1)).tolist()
            table = table.take(pa.array(order[: bounds[-1]])).cast(schema)
            for number, (start, end) in enumerate(pairwise(bounds)):
                if end > start:
                    buffers[number].append(table.slice(start, end - start))
            num_buffered += bounds[-1]
            if num_buffered >= _BUFFERED_ROWS:
                flush()
                num_buffered = 0
        flush()
    finally:
        for writer in writers:
            writer.close()


def _group_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def _joined(group: Sequence[Job], records: pa.Table, captions: pa.Table) -> Iterator[Job]:
    """Join plan, records and captions of each job; keys that are not kept any more are left out."""
    record_rows, caption_rows = (KeyRows(key_numbers(table.column("key"))) for table in (records, captions))
    for job in group:
        keys = key_numbers(job.plan.column("key"))
        at = record_rows.of(keys)
        is_kept = at >= 0
        plan, at = job.plan.filter(pa.array(is_kept)), at[is_kept]
        rows = records.take(pa.array(at))
        texts = captions.take(pa.array(caption_rows.of(keys[is_kept])))
        for name in ("dataset", "period", "repeats", "loss_weight"):
            rows = rows.append_column(name, plan.column(name))
        for name in ("text", "groups"):
            rows = rows.append_column(name, texts.column(name))
        if job.masks:
            masks = pc.filter(pa.array(job.masks, pa.string()), pa.array(is_kept))
            rows = rows.append_column("mask_sha256", masks)
        yield replace(job, records=rows)
