"""Decide which sample goes into which chunk: `python -m sharding plan DATASET.toml`.

Reads keys, sources and dates of what dedupe kept, lets pure functions decide, and writes the plan: `held_out` sets
validation pictures aside, `weights` says how often each is shown, `plan_rows` cuts the rest into chunks. Chunks that
are full, or that a run has trained (sealed), never change; only a short last chunk is filled up. To plan afresh, delete
the plan; what is trained or held out stays where it is. No pixels and no captions here.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import HELD_OUT_NAME, chunk_folders, chunk_name, chunk_number, is_sealed, load_chunk, open_chunk
from sharding.config import DatasetConfig
from sharding.files import digest_of, locked, remove_temporaries
from sharding.keys import key_numbers
from sharding.planning.held_out import Separation, separate
from sharding.planning.order import name_codes, places, spans_of
from sharding.planning.report import PlanReport, report_of
from sharding.planning.rows import CURRENT, plan_rows
from sharding.planning.weights import columns_needed, weigh
from sharding.runlog import EventLog
from sharding.schema import DROPS, HELD_OUT, PLAN, RELATIVES, Workspace, drop_row
from sharding.tables import is_current, list_parts, part_metadata, part_name, read_part, read_parts, write_part

logger = logging.getLogger(__name__)


def make_plan(config: DatasetConfig, workspace: Workspace, *, dry_run: bool = False) -> PlanReport:
    """Plan every kept key and write `plan/` (PLAN, and DROPS for what is kept but not planned).

    Reads only keys, sources, dates, and what [[plan.weights]] asks for. Does nothing when the plan is current.
    Raises FileNotFoundError when dedupe has not been run, ValueError when a key is kept twice.
    """
    with locked(workspace.plan, dry_run=dry_run):
        return _plan(config, workspace, dry_run=dry_run)


def _plan(config: DatasetConfig, workspace: Workspace, *, dry_run: bool) -> PlanReport:
    made_from = _digest(config, workspace)
    plan_path, drops_path = workspace.plan / part_name(0), workspace.plan / "drops" / part_name(0)
    previous = read_parts(workspace.plan, schema=PLAN)
    current, without_period = _read_kept(config, workspace)
    if is_current(plan_path, made_from) and is_current(drops_path, made_from):
        keys, current_keys = (key_numbers(table.column("key")) for table in (previous, current))
        report = report_of(previous, read_part(drops_path, ["reason"]).column("reason"), keys, current_keys)
        return replace(report, is_unchanged=True)
    sealed = sealed_chunks(workspace)
    if not list_parts(workspace.plan):
        previous = _rows_on_disk(workspace, sealed)
    previous_keys, current_keys = (key_numbers(table.column("key")) for table in (previous, current))
    separation = _separate(config, workspace, previous, current, sealed)
    related = _related_drops(workspace, current, separation)
    previous, current = _trainable(previous, current, separation)
    rows = plan_rows(
        previous, current, chunk_size=config.plan.chunk_size, seed=config.plan.seed, sealed=sealed
    )  # fmt: skip
    del previous, current  # at millions of rows each is hundreds of megabytes
    rows = _merged(separation.held_out, rows)
    planned = key_numbers(rows.column("key"))
    drops = pa.concat_tables([_no_period_drops(without_period, planned), related])
    report = report_of(rows, drops.column("reason"), previous_keys, current_keys)
    if dry_run:
        return replace(report, is_dry_run=True)
    for folder in (workspace.plan, drops_path.parent):
        remove_temporaries(folder)
    write_part(drops_path, drops, made_from=made_from)
    write_part(plan_path, rows, made_from=made_from)
    EventLog(workspace.events, stage="plan").write(
        "planned", images=report.num_images, chunks=report.num_chunks, new=report.num_new,
        held_out=report.num_held_out, dropped=drops.num_rows,
    )  # fmt: skip
    return report


def _separate(
    config: DatasetConfig,
    workspace: Workspace,
    previous: pa.Table,
    current: pa.Table,
    sealed: Collection[tuple[str, int]],
) -> Separation:
    _require_unique(current)
    return separate(
        previous, current, size=config.plan.held_out, max_fraction=config.plan.held_out_max_fraction,
        seed=config.plan.seed, sealed=sealed, trained=_trained_elsewhere(workspace),
        relatives=read_parts(workspace.dedupe / "relatives", schema=RELATIVES),
    )  # fmt: skip


def _trainable(previous: pa.Table, current: pa.Table, separation: Separation) -> tuple[pa.Table, pa.Table]:
    """Return the rows of both tables that are neither held out nor dropped."""
    stays = previous.column("chunk").to_numpy() != HELD_OUT
    if not separation.is_trainable.all():
        kept_out = key_numbers(current.column("key").filter(pa.array(~separation.is_trainable)))
        stays &= places(kept_out, key_numbers(previous.column("key"))) < 0
        current = current.filter(pa.array(separation.is_trainable))
    return (previous if stays.all() else previous.filter(pa.array(stays))), current


def _merged(held_out: pa.Table, rows: pa.Table) -> pa.Table:
    """Put each dataset's held-out rows before its others. Both are sorted by dataset; nothing is copied."""
    spans = [spans_of(*name_codes(table.column("dataset"))) for table in (held_out, rows)]
    return pa.concat_tables(
        [
            table.slice(*span[name])
            for name in sorted({*spans[0], *spans[1]})
            for table, span in zip((held_out, rows), spans, strict=True)
            if name in span
        ]
        or [rows]
    )


def _require_unique(current: pa.Table) -> None:
    ordered = np.sort(key_numbers(current.column("key")))
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise ValueError(
            f"dedupe/kept: key {int(ordered[twice[0]]):016x} stands twice; run `python -m sharding dedupe` again"
        )


# --- the workspace ---


def sealed_chunks(workspace: Workspace) -> set[tuple[str, int]]:
    """Return (dataset, chunk) of every chunk folder that carries a run's seal. Combined chunks have no number here."""
    numbered = [(folder, chunk_number(folder)) for folder in workspace.chunks.glob("*/*")]
    return {(path.parent.name, number) for path, number in numbered if number is not None and is_sealed(path)}


def _rows_on_disk(workspace: Workspace, sealed: Collection[tuple[str, int]]) -> pa.Table:
    """Return the plan of trained and held-out chunks as their indexes have it: what a lost plan must not break."""
    held_out = {(path.parent.name, HELD_OUT) for path in chunk_folders(workspace.chunks) if path.name == HELD_OUT_NAME}
    tables = [PLAN.empty_table()]
    for dataset, chunk in sorted({*sealed, *held_out}):
        index = open_chunk(workspace.chunks / chunk_name(dataset, chunk)).read_index()
        index = index.append_column("chunk", pa.array(np.full(index.num_rows, chunk), pa.int32()))
        index = index.append_column("position", pa.array(np.arange(index.num_rows), pa.int32()))
        tables.append(index.select(PLAN.names).cast(PLAN))
    return pa.concat_tables(tables)


def _trained_elsewhere(workspace: Workspace) -> pa.Table:
    """Return the keys of trained combined chunks with tars of their own, whose plain chunks carry no seal."""
    folders = [folder for folder in chunk_folders(workspace.chunks) if chunk_number(folder) is None]
    chunks = [load_chunk(folder) for folder in folders if is_sealed(folder)]
    tables = [
        chunk.read_index().select(["key"]) for chunk in chunks if not any("/" in s.path for s in chunk.info.shards)
    ]
    return pa.concat_tables([pa.schema([PLAN.field("key")]).empty_table(), *tables])


def _digest(config: DatasetConfig, workspace: Workspace) -> str:
    parts = list_parts(workspace.kept)
    if not parts:
        raise FileNotFoundError(f"{workspace.kept}: no kept records; run `python -m sharding dedupe` first")
    relatives = list_parts(workspace.dedupe / "relatives")
    return digest_of(
        {
            "kept": [[part.name, part_metadata(part).get("made_from"), part.stat().st_size] for part in parts],
            "filed": {name: source.dataset for name, source in config.sources.items()},
            "periods": {name: list(years) for name, years in config.periods.items()},
            "plan": config.plan.model_dump(),
            "relatives": [[part.name, part_metadata(part).get("made_from"), part.stat().st_size] for part in relatives],
        }
    )


def _read_kept(config: DatasetConfig, workspace: Workspace) -> tuple[pa.Table, list[tuple[Path, pa.Table]]]:
    """Return the kept keys (CURRENT), and per part the keys that no period holds."""
    tables, without_period = [], []
    rules = config.plan.weights
    for part in list_parts(workspace.kept):
        kept = read_part(part, ["key", "source", "created_at", *columns_needed(rules)])
        years = pc.fill_null(pc.year(kept.column("created_at")), 0).cast(pa.int32())
        pairs = pa.table({"source": kept.column("source"), "year": years})
        datasets, periods = _file_under(config, pairs)
        weights = weigh(kept.append_column("dataset", datasets), rules)
        columns = [kept.column("key"), datasets, periods, pa.array(weights.repeats), pa.array(weights.loss_weight)]
        table = pa.table(columns, schema=CURRENT)
        has_dataset = pc.not_equal(table.column("dataset"), "")
        tables.append(table.filter(has_dataset).combine_chunks())
        if tables[-1].num_rows < table.num_rows:
            without_period.append((part, table.filter(pc.invert(has_dataset)).select(["key"])))
    return pa.concat_tables(tables), without_period


def _file_under(config: DatasetConfig, pairs: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Ask the config once per distinct (source, year); year 0 stands for no date."""
    codes = pc.add(pc.multiply(pairs.column("year"), len(config.sources)), _source_codes(config, pairs))
    distinct = pc.unique(codes)
    names = list(config.sources)
    answers = [config.file_under(names[code % len(names)], code // len(names) or None) for code in distinct.to_pylist()]
    at = pc.index_in(codes, value_set=distinct)
    datasets = pa.array([dataset for dataset, _ in answers], pa.string())
    periods = pa.array([period for _, period in answers], pa.string())
    return pa.chunked_array([datasets.take(at.combine_chunks())]), pa.chunked_array([periods.take(at.combine_chunks())])


def _source_codes(config: DatasetConfig, pairs: pa.Table) -> pa.ChunkedArray:
    codes = pc.index_in(pairs.column("source"), value_set=pa.array(list(config.sources), pa.string()))
    if codes.null_count:
        unknown = pairs.filter(pc.is_null(codes)).column("source")[0].as_py()
        raise ValueError(
            f"dedupe/kept: source {unknown!r} is not in the config, which has {', '.join(config.sources)}; "
            "put it back or run `python -m sharding scan` and `dedupe` again"
        )
    return codes


def _no_period_drops(without_period: list[tuple[Path, pa.Table]], planned: np.ndarray[Any, Any]) -> pa.Table:
    rows = []
    for part, keys in without_period:
        is_dropped = places(planned, key_numbers(keys.column("key"))) < 0
        dropped = keys.column("key").filter(pa.array(is_dropped))
        kept = read_part(part, ["key", "source", "path", "created_at"])
        kept = kept.filter(pc.is_in(kept.column("key"), value_set=dropped.combine_chunks()))
        for row in kept.to_pylist():
            date = row["created_at"]
            detail = "no date is known" if date is None else f"no period holds the year {date.year}"
            rows.append(drop_row(row, stage="plan", reason="no_period", detail=detail))
    return pa.Table.from_pylist(rows, schema=DROPS)


def _related_drops(workspace: Workspace, current: pa.Table, separation: Separation) -> pa.Table:
    rows = []
    for reason, pairs, what in (
        ("related_to_held_out", separation.related_to_held_out, "is held out for validation"),
        ("related_to_trained", separation.related_to_trained, "has been trained, so this one cannot validate any more"),
    ):
        keys, relatives = (current.column("key").take(pa.array(pairs[:, side])).to_pylist() for side in (0, 1))
        relative_of = dict(zip(keys, relatives, strict=True))
        for record in _records(workspace, relative_of) if relative_of else ():
            other = relative_of[record["key"]]
            detail = f"its relative {other} {what}"
            rows.append(drop_row(record, stage="plan", reason=reason, kept_key=other, detail=detail))
    return pa.Table.from_pylist(rows, schema=DROPS)


def _records(workspace: Workspace, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield key, source and path of some kept records, in the order of the parts."""
    wanted = pa.array(sorted(keys))
    for part in list_parts(workspace.kept):
        kept = read_part(part, ["key", "source", "path"])
        yield from kept.filter(pc.is_in(kept.column("key"), value_set=wanted)).to_pylist()
