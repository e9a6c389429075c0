"""Decide which sample goes into which chunk: `python -m sharding plan DATASET.toml`.

`plan_rows` is a pure function of the previous plan and the kept keys. Each dataset is shuffled by a seeded hash of
its keys and cut into chunks, so every chunk is a uniform random sample of its dataset. Chunks that are full, or that
a run has trained (sealed), never change; only a short last chunk is filled up. To plan afresh, delete the plan;
what is trained stays where it is.
No pixels and no captions here, and no Python object per sample: millions of rows are a few hundred megabytes.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import chunk_name, is_sealed, open_chunk
from sharding.config import DatasetConfig
from sharding.files import digest_of, remove_temporaries
from sharding.keys import is_in, key_array
from sharding.runlog import EventLog
from sharding.schema import DROPS, PLAN, Workspace, drop_row
from sharding.tables import is_current, list_parts, part_metadata, part_name, read_part, read_parts, write_part

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 20
CURRENT = pa.schema([("key", pa.string()), ("dataset", pa.string()), ("period", pa.string())])
"""Columns of the kept keys as `plan_rows` takes them."""


@dataclass(frozen=True)
class PlannedDataset:
    """A dataset's row of the seed's table: how many images in how many chunks."""

    name: str
    num_images: int
    num_chunks: int
    num_last_chunk: int
    """Images in its last chunk."""


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
    num_no_period: int
    is_unchanged: bool
    """The plan on disk was made from the same kept keys and settings and was left as it is."""
    is_dry_run: bool = False

    @property
    def num_images(self) -> int:
        return sum(dataset.num_images for dataset in self.datasets)

    @property
    def num_chunks(self) -> int:
        return sum(dataset.num_chunks for dataset in self.datasets)

    def summary(self) -> str:
        """Return the table of datasets and one line for each thing worth knowing."""
        width = max([len("dataset"), *(len(dataset.name) for dataset in self.datasets)])
        lines = [f"{'dataset':{width}}  {'images':>12}  {'chunks':>7}  {'in the last':>11}"]
        lines += [
            f"{row.name:{width}}  {row.num_images:>12,}  {row.num_chunks:>7,}  {row.num_last_chunk:>11,}"
            for row in self.datasets
        ]
        lines.append(f"{'total':{width}}  {self.num_images:>12,}  {self.num_chunks:>7,}")
        lines.append("the plan is current" if self.is_unchanged else f"{self.num_new:,} new keys planned")
        if self.num_no_period:
            lines.append(f"{self.num_no_period:,} dropped: no_period")
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


def make_plan(config: DatasetConfig, workspace: Workspace, *, dry_run: bool = False) -> PlanReport:
    """Plan every kept key and write `plan/` (PLAN, and DROPS for pictures filed by date without a period).

    Reads only keys, sources and dates. Does nothing when the plan is current.
    Raises FileNotFoundError when dedupe has not been run, ValueError when a key is kept twice.
    """
    made_from = _digest(config, workspace)
    plan_path, drops_path = workspace.plan / part_name(0), workspace.plan / "drops" / part_name(0)
    previous = read_parts(workspace.plan, schema=PLAN)
    current, without_period = _read_kept(config, workspace)
    if is_current(plan_path, made_from) and is_current(drops_path, made_from):
        num_drops = read_part(drops_path, ["key"]).num_rows
        vanished = _vanished(previous, current)
        return _report(previous, previous, num_drops, num_removed=0, vanished=vanished, is_unchanged=True)
    sealed = sealed_chunks(workspace)
    if not list_parts(workspace.plan):
        previous = _trained_rows(workspace, sealed)
    rows = plan_rows(
        previous, current, chunk_size=config.plan.chunk_size, seed=config.plan.seed, sealed=sealed
    )  # fmt: skip
    planned = key_array(rows.column("key"))
    drops = _no_period_drops(workspace, without_period, planned)
    num_removed = int((~is_in(key_array(previous.column("key")), planned)).sum())
    report = _report(
        previous, rows, drops.num_rows,
        num_removed=num_removed, vanished=_vanished(rows, current), is_unchanged=False,
    )  # fmt: skip
    if dry_run:
        return replace(report, is_dry_run=True)
    for folder in (workspace.plan, drops_path.parent):
        remove_temporaries(folder)
    write_part(drops_path, drops, made_from=made_from)
    write_part(plan_path, rows, made_from=made_from)
    EventLog(workspace.events, stage="plan").write(
        "planned", images=report.num_images, chunks=report.num_chunks, new=report.num_new, no_period=drops.num_rows
    )
    return report


def plan_rows(
    previous: pa.Table,
    current: pa.Table,
    *,
    chunk_size: int,
    seed: int,
    sealed: Collection[tuple[str, int]] = (),
) -> pa.Table:
    """Return the new plan (schema PLAN), sorted by dataset, chunk and position.

    previous: the plan so far, as this function returned it, or empty.
    current: the kept keys (schema CURRENT), each once, in any order.
    sealed: (dataset, chunk) that a run has trained.

    A chunk of the previous plan is fixed when it is sealed, when it holds chunk_size rows or more, or when it is not
    its dataset's last; its rows are returned as they are, whether their keys are still kept or not. A short last
    chunk keeps its keys and is filled up with new ones. Raises ValueError when a key stands twice in `current`.
    """
    keys = key_array(current.column("key"))
    _require_unique(keys)
    pa.default_memory_pool().release_unused()
    previous_keys = key_array(previous.column("key"))
    previous_chunks = previous.column("chunk").to_numpy()
    is_fixed = np.zeros(len(previous_keys), dtype=bool)
    open_chunks: dict[str, int] = {}
    previous_names, previous_codes = _codes(previous.column("dataset"))
    for code, name in enumerate(previous_names):
        in_dataset = previous_codes == code
        last = int(previous_chunks[in_dataset].max())
        in_last = in_dataset & (previous_chunks == last)
        if (name, last) in sealed or in_last.sum() >= chunk_size:
            is_fixed |= in_dataset
            open_chunks[name] = last + 1
        else:
            is_fixed |= in_dataset & ~in_last
            open_chunks[name] = last

    is_free = ~is_in(keys, previous_keys[is_fixed])
    names, codes = _codes(current.column("dataset"))
    tables = [PLAN.empty_table()]
    for name in sorted({*previous_names, *names}):
        was_here = previous_codes == previous_names.index(name) if name in previous_names else np.zeros(0, dtype=bool)
        if was_here.any():
            tables.append(previous.filter(pa.array(was_here & is_fixed)))
        rows = np.flatnonzero(is_free & (codes == names.index(name))) if name in names else np.zeros(0, dtype=np.int64)
        if len(rows):
            stayed = previous_keys[was_here & ~is_fixed] if was_here.any() else previous_keys[:0]
            rows = rows[_training_order(keys[rows], stayed, chunk_size=chunk_size, seed=seed, dataset=name)]
            tables.append(
                _cut(current.take(pa.array(rows)), chunk_size=chunk_size, first_chunk=open_chunks.get(name, 0))
            )
    return pa.concat_tables(tables)


def _training_order(
    keys: np.ndarray[Any, Any], stayed: np.ndarray[Any, Any], *, chunk_size: int, seed: int, dataset: str
) -> np.ndarray[Any, Any]:
    """Return the shuffled order of `keys`; those in `stayed` keep their place in the first chunk, in a new order."""
    order = _order(keys, seed=seed, dataset=dataset)
    by_age = np.lexsort((order, ~is_in(keys, stayed)))
    first = by_age[:chunk_size]
    return np.concatenate([first[np.argsort(order[first], kind="stable")], by_age[chunk_size:]])


def sealed_chunks(workspace: Workspace) -> set[tuple[str, int]]:
    """Return (dataset, chunk) of every chunk folder that carries a run's seal. Combined chunks have no number here."""
    folders = [path for path in workspace.chunks.glob("*/*") if path.name.isdigit()]
    return {(folder.parent.name, int(folder.name)) for folder in folders if is_sealed(folder)}


def _trained_rows(workspace: Workspace, sealed: Collection[tuple[str, int]]) -> pa.Table:
    """Return the plan of the trained chunks as their indexes have it: what a plan that was lost must not break."""
    tables = [PLAN.empty_table()]
    for dataset, chunk in sorted(sealed):
        index = open_chunk(workspace.chunks / chunk_name(dataset, chunk)).read_index()
        index = index.append_column("chunk", pa.array(np.full(index.num_rows, chunk), pa.int32()))
        index = index.append_column("position", pa.array(np.arange(index.num_rows), pa.int32()))
        tables.append(index.select(PLAN.names).cast(PLAN))
    return pa.concat_tables(tables)


def _cut(rows: pa.Table, *, chunk_size: int, first_chunk: int) -> pa.Table:
    numbers = np.arange(rows.num_rows)
    columns: dict[str, Any] = {
        "key": rows.column("key"),
        "dataset": rows.column("dataset"),
        "period": rows.column("period"),
        "chunk": pa.array(first_chunk + numbers // chunk_size, pa.int32()),
        "position": pa.array(numbers % chunk_size, pa.int32()),
        "repeats": pa.array(np.ones(rows.num_rows), pa.int32()),
        "loss_weight": pa.array(np.ones(rows.num_rows), pa.float32()),
    }
    return pa.table([columns[name] for name in PLAN.names], schema=PLAN)


# --- keys and their order ---


def _require_unique(keys: np.ndarray[Any, Any]) -> None:
    ordered = np.sort(keys)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise ValueError(
            f"dedupe/kept: key {ordered[twice[0]].decode()} stands twice; run `python -m sharding dedupe` again"
        )


def _codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return the distinct names, sorted, and each row's number among them."""
    names = sorted(pc.unique(column).to_pylist())
    return names, pc.index_in(column, value_set=pa.array(names, pa.string())).to_numpy().astype(np.int64)


def _order(keys: np.ndarray[Any, Any], *, seed: int, dataset: str) -> np.ndarray[Any, Any]:
    """Return each key's rank in the seeded shuffle: by a hash of (seed, dataset, key), then by key.

    The hash is SplitMix64's finalizer over the key's two words (Steele, Lea, Flood: Fast Splittable Pseudorandom
    Number Generators, 2014), started from SHA-256 of seed and dataset.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{dataset}".encode()).digest()[:8], "little")
    words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    with np.errstate(over="ignore"):
        hashed = _mix(_mix(words[:, 0] ^ np.uint64(start)) + words[:, 1])
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[np.lexsort((keys, hashed))] = np.arange(len(keys))
    return ranks


def _mix(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[Any, Any] = words ^ (words >> np.uint64(31))
    return mixed


# --- the workspace ---


def _digest(config: DatasetConfig, workspace: Workspace) -> str:
    parts = list_parts(workspace.kept)
    if not parts:
        raise FileNotFoundError(f"{workspace.kept}: no kept records; run `python -m sharding dedupe` first")
    return digest_of(
        {
            "kept": [[part.name, part_metadata(part).get("made_from"), part.stat().st_size] for part in parts],
            "filed": {name: source.dataset for name, source in config.sources.items()},
            "periods": {name: list(years) for name, years in config.periods.items()},
            "plan": config.plan.model_dump(),
        }
    )


def _read_kept(config: DatasetConfig, workspace: Workspace) -> tuple[pa.Table, list[tuple[Path, pa.Table]]]:
    """Return the kept keys with dataset and period, and per part the keys that no period holds."""
    tables, without_period = [], []
    for part in list_parts(workspace.kept):
        kept = read_part(part, ["key", "source", "created_at"])
        years = pc.fill_null(pc.year(kept.column("created_at")), 0).cast(pa.int32())
        pairs = pa.table({"source": kept.column("source"), "year": years})
        datasets, periods = _file_under(config, pairs)
        table = pa.table([kept.column("key"), datasets, periods], schema=CURRENT)
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


def _no_period_drops(
    workspace: Workspace, without_period: list[tuple[Path, pa.Table]], planned: np.ndarray[Any, Any]
) -> pa.Table:
    def rows() -> Iterator[dict[str, Any]]:
        for part, keys in without_period:
            is_dropped = ~is_in(key_array(keys.column("key")), planned)
            dropped = keys.column("key").filter(pa.array(is_dropped))
            kept = read_part(part, ["key", "source", "path", "created_at"])
            kept = kept.filter(pc.is_in(kept.column("key"), value_set=dropped.combine_chunks()))
            for row in kept.to_pylist():
                date = row["created_at"]
                detail = "no date is known" if date is None else f"no period holds the year {date.year}"
                yield drop_row(row, stage="plan", reason="no_period", detail=detail)

    return pa.Table.from_pylist(list(rows()), schema=DROPS)


def _vanished(plan: pa.Table, current: pa.Table) -> list[str]:
    keys = key_array(plan.column("key"))
    gone = keys[~is_in(keys, key_array(current.column("key")))]
    return [key.decode() for key in np.sort(gone)]


def _report(
    previous: pa.Table,
    rows: pa.Table,
    num_no_period: int,
    *,
    num_removed: int,
    vanished: list[str],
    is_unchanged: bool,
) -> PlanReport:
    counts = rows.group_by(["dataset", "chunk"]).aggregate([("key", "count")])
    by_dataset: dict[str, dict[int, int]] = {}
    for row in counts.to_pylist():
        by_dataset.setdefault(row["dataset"], {})[row["chunk"]] = row["key_count"]
    return PlanReport(
        datasets=tuple(
            PlannedDataset(name, sum(sizes.values()), len(sizes), sizes[max(sizes)])
            for name, sizes in sorted(by_dataset.items())
        ),
        num_new=rows.num_rows - (previous.num_rows - num_removed),
        num_removed=num_removed,
        num_vanished=len(vanished),
        first_vanished=tuple(vanished[:_SHOWN_KEYS]),
        num_no_period=num_no_period,
        is_unchanged=is_unchanged,
    )
