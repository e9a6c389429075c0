"""scan: every file of every source becomes one row of the manifest.

Freezes the listing (`listing`), then makes each part of the manifest from the part of the same name: every file is
read once, in worker processes (`record`). What belongs to which command line is in `cli`.

    python -m sharding scan configs/datasets/X.toml --workspace W --workers 8
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import DatasetConfig
from sharding.files import LEFT_OVER_SECONDS, remove_temporaries
from sharding.filters import RULES
from sharding.images import BrokenFractionError, is_too_broken
from sharding.listing import NOTHING, Row, check_roots, extend_listing, find_images, is_frozen, read_listing, unlisted
from sharding.metadata import check_tables
from sharding.record import BROKEN, FileTask, Rules
from sharding.record_pool import RecordPool
from sharding.runlog import EventLog, Progress
from sharding.schema import DECISIONS, MANIFEST, Workspace
from sharding.tables import is_current, list_parts, owned_parts, read_part, read_parts, write_part
from sharding.takeover import (
    STAMPS_FOLDER,
    EarlierPart,
    MovedPixels,
    Stamps,
    overruled_today,
    read_earlier,
    readable_parts,
    stamp_rows,
    stamps_path,
    tables_of,
    vanished_pixels,
    vanished_row,
    write_stamps,
)

logger = logging.getLogger(__name__)

_KEEPING = ("keep", "preferred_keeper", "not_a_duplicate")
"""Decisions that overrule the filters."""
CHANGES = ("new", "changed", "moved", "vanished", "returned")
_MAX_FILE_EVENTS = 1_000
"""Changed, vanished and moved files that get an event each; the manifest has them all."""


@dataclass(frozen=True)
class ScanReport:
    """What a scan found. Counts are of the parts this task owns, made now or before."""

    num_files: int
    status_counts: Mapping[str, int]
    """Files by status; `kept` first, then by number. After a dry run only parts that are current are counted."""
    parts_made: int
    """In a dry run: that would be made."""
    parts_current: int
    num_new_files: int
    """Files that joined the listing now; in a dry run: that would."""
    changes: Mapping[str, int]
    """What became of files since they were scanned last, in the parts made now, by their bytes: new (at no path
    before), changed (other bytes at the path), moved (bytes now at another path), vanished (bytes nowhere), returned;
    and how many files were read and how many rows taken over without reading."""
    num_other_files: int
    """Neither pictures nor sidecars; 0 when the sources were not walked."""
    num_linked_files: int
    problems: tuple[str, ...]
    """What could not be listed, one line each."""
    is_dry_run: bool

    def summary(self) -> str:
        """Return the sum, the drops by reason, what was done and what could not be listed."""
        num_kept = self.status_counts.get("kept", 0)
        lines = []
        if self.num_files or not self.is_dry_run:
            lines.append(f"{self.num_files:,} files: {num_kept:,} kept, {self.num_files - num_kept:,} dropped")
        lines += [f"  {count:,} {status}" for status, count in self.status_counts.items() if status != "kept"]
        made, listed = ("would be made", "would be listed") if self.is_dry_run else ("made", "listed")
        lines.append(f"{self.parts_made:,} parts {made}, {self.parts_current:,} current")
        if self.num_new_files:
            lines.append(f"{self.num_new_files:,} new files {listed}")
        if any(count for name, count in self.changes.items() if name not in ("new", "read")):
            told = ", ".join(f"{self.changes[name]:,} {name}" for name in CHANGES if self.changes[name])
            read, taken_over = self.changes["read"], self.changes["taken_over"]
            lines.append(f"{told or 'nothing changed'}; {read:,} files read, {taken_over:,} not read again")
        if self.num_other_files:
            lines.append(f"{self.num_other_files:,} other files are neither pictures nor sidecars")
        if self.num_linked_files:
            lines.append(f"{self.num_linked_files:,} links to files that are listed already")
        if self.problems:
            lines.append(f"{len(self.problems):,} could not be listed, first {self.problems[0]}")
        return "\n".join(lines)


def scan(
    config: DatasetConfig,
    workspace: Workspace,
    *,
    workers: int,
    part_index: int = 0,
    num_parts: int = 1,
    dry_run: bool = False,
) -> ScanReport:
    """Bring listing and manifest up to date with the files.

    workers: processes that decode; 0 decodes in this one. part_index, num_parts: this task's share of the parts. The
    sources are walked for new files unless this is a later task of several and the listing exists. Of a part that is
    made again, only files that have changed, or that a decision or a setting concerns, are read.

    Raises FileNotFoundError for a missing source folder or table before anything is written, ValueError for a
    part_index out of range, and BrokenFractionError, after all parts are written, when `is_too_broken` says so of
    this task's files that are undecodable, not_an_image, empty_file or unreadable.
    """
    owned_parts([], part_index, num_parts)  # refuses a wrong share before any work
    check_roots(roots := {name: source.root for name, source in config.sources.items()})
    for source in config.sources.values():
        check_tables(tables_of(source))
    events = EventLog(workspace.events, stage="scan")
    found = NOTHING
    num_new_files = 0
    if part_index == 0 or not is_frozen(workspace.listing):
        found = find_images(roots, with_tars=[n for n, s in config.sources.items() if s.importer == "webdataset"])
        if dry_run:
            num_new_files = unlisted(found.rows, workspace.listing).num_rows
        else:
            num_new_files = extend_listing(workspace.listing, found.rows, config.part_size)
            for problem in found.problems:
                logger.warning("%s/%s: %s: %s", problem.source, problem.path, problem.reason, problem.detail)
                events.write("not_listed", **vars(problem))
    if not dry_run:
        for folder in (workspace.listing, workspace.manifest, workspace.manifest / STAMPS_FOLDER):
            remove_temporaries(folder, min_age_seconds=LEFT_OVER_SECONDS)
    parts = owned_parts(list_parts(workspace.listing), part_index, num_parts)
    num_files = _count_files(config, parts)
    rules = Rules(filters=config.filters, dedupe=config.dedupe)
    tally = _Tally()
    with Progress(num_files, unit="files", title="scan") as progress, RecordPool(workers, rules) as pool:
        maker = _PartMaker(config, workspace, pool, progress, events, tally)
        for part in parts:
            maker.bring_up_to_date(part, dry_run=dry_run)
        maker.tell_moved()
    new_parts = -(-num_new_files // config.part_size) if dry_run else 0
    counts = tally.statuses
    report = ScanReport(
        num_files=sum(counts.values()),
        status_counts=dict(sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))),
        parts_made=tally.parts_made + new_parts,
        parts_current=len(parts) - tally.parts_made,
        num_new_files=num_new_files,
        changes={name: tally.changes[name] for name in (*CHANGES, "read", "taken_over")},
        num_other_files=found.num_other_files,
        num_linked_files=found.num_linked_files,
        problems=tuple(f"{p.source}/{p.path}: {p.reason}: {p.detail}" for p in found.problems),
        is_dry_run=dry_run,
    )
    if not dry_run:
        events.write("done", files=report.num_files, statuses=dict(report.status_counts), parts_made=tally.parts_made,
                     changes=dict(report.changes))  # fmt: skip
        _refuse_broken(config, counts, tally.broken_keys)
    return report


def _count_files(config: DatasetConfig, parts: Sequence[Path]) -> int:
    """Return the number of files in these parts of the listing. Raises ValueError for a source not in the config."""
    num_files = 0
    for part in parts:
        sources = read_part(part, ["source"])["source"]
        num_files += len(sources)
        if unknown := sorted(set(pc.unique(sources).to_pylist()) - set(config.sources)):
            raise ValueError(
                f"sources.{unknown[0]}: the listing holds files of this source, but the config no longer has it; "
                "put it back, or start a new workspace"
            )
    return num_files


def _kept_keys(workspace: Workspace) -> frozenset[str]:
    """Return the keys that people keep whatever the filters say."""
    decisions = read_parts(workspace.decisions, ["key", "decision"], schema=DECISIONS)
    is_keeping = pc.is_in(decisions["decision"], value_set=pa.array(_KEEPING))
    return frozenset(decisions["key"].filter(is_keeping).to_pylist())


def _refuse_broken(config: DatasetConfig, counts: Counter[str], broken_keys: Sequence[str]) -> None:
    num_files = sum(counts.values())
    num_broken = sum(counts[status] for status in BROKEN)
    if not is_too_broken(num_broken, num_files, max_broken_fraction=config.max_broken_fraction):
        return
    by_reason = ", ".join(f"{counts[status]:,} {status}" for status in BROKEN if counts[status])
    raise BrokenFractionError(
        f"{num_broken:,} of {num_files:,} files are broken ({by_reason}), more than max_broken_fraction = "
        f"{config.max_broken_fraction:g}; first {'; '.join(broken_keys[:5])}; see status and detail in the manifest, "
        "then repair the files or raise max_broken_fraction"
    )


# --- one part ---


@dataclass
class _Tally:
    """What the parts of this task hold, summed up while they are gone through."""

    statuses: Counter[str] = field(default_factory=Counter)
    broken_keys: list[str] = field(default_factory=list)
    parts_made: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    vanished: dict[str, str] = field(default_factory=dict)
    """SOURCE/PATH of files that have vanished now, by key."""
    new_parts: set[str] = field(default_factory=set)
    num_file_events: int = 0

    def count(self, table: pa.Table) -> None:
        for entry in pc.value_counts(table["status"]).to_pylist():
            self.statuses[entry["values"]] += entry["counts"]
        broken = table.filter(pc.is_in(table["status"], value_set=pa.array(BROKEN)))
        for row in broken.slice(0, 5).select(["key", "source", "path"]).to_pylist():
            self.broken_keys.append(f"{row['key'] or '(no key)'} {row['source']}/{row['path']}")


class _PartMaker:
    """Makes manifest parts from listing parts, one after the other."""

    def __init__(
        self, config: DatasetConfig, workspace: Workspace, pool: RecordPool, progress: Progress, events: EventLog,
        tally: _Tally,
    ) -> None:  # fmt: skip
        self.config = config
        self.manifest = workspace.manifest
        self.kept_keys = _kept_keys(workspace)
        self.pool = pool
        self.progress = progress
        self.events = events
        self.tally = tally
        self._moved: MovedPixels | None = None

    def bring_up_to_date(self, listed: Path, *, dry_run: bool) -> None:
        """Make the part of this listing part unless it is current; count what it holds."""
        target = self.manifest / listed.name
        today = stamp_rows(self.config, read_listing(listed))
        made_from = today.made_from(overruled_today(target, self.kept_keys))
        if is_current(target, made_from):
            self.tally.count(read_part(target, ["status", "key", "source", "path"]))
            self.progress.advance(len(today.rows))
            if not dry_run and not is_current(stamps_path(target), made_from):
                # Lost between two renames. No row is overruled: else made_from would have been another.
                write_stamps(target, today, [False] * len(today.rows), made_from=made_from)
            return
        self.tally.parts_made += 1
        if not dry_run:
            self._make(target, today)

    def _make(self, target: Path, today: Stamps) -> None:
        earlier = read_earlier(target, today.pixels)
        is_same = earlier.unchanged(today, self.kept_keys) if earlier else [False] * len(today.rows)
        places = [place for place, same in enumerate(is_same) if not same]
        self.progress.advance(len(is_same) - len(places))
        records, overruled = self._read(today, places, earlier)
        if earlier is not None:
            records = self._compared(earlier, places, records)
        elif not target.exists():  # else it is damaged
            self.tally.new_parts.add(target.name)
            self.tally.changes["new"] += len(records)
        table = _merged(earlier, places, records)
        is_overruled = [
            place in overruled or (is_same[place] and earlier is not None and earlier.is_overruled[place])
            for place in range(len(is_same))
        ]
        made_from = today.made_from(table["key"].filter(pa.array(is_overruled, pa.bool_())).to_pylist())
        write_part(target, table, made_from=made_from)
        write_stamps(target, today, is_overruled, made_from=made_from)
        self.tally.count(table)
        self.tally.changes["read"] += len(places)
        self.tally.changes["taken_over"] += len(is_same) - len(places)
        statuses = Counter(table["status"].to_pylist())
        self.events.write("part", part=target.name, files=len(is_same), read=len(places),
                          statuses=dict(sorted(statuses.items())))  # fmt: skip

    def _read(
        self, today: Stamps, places: Sequence[int], earlier: EarlierPart | None
    ) -> tuple[list[dict[str, Any]], set[int]]:
        """Return the records of these rows, and which of them a person keeps against the filters."""
        tasks = []
        for place in places:
            row = today.rows[place]
            decoded = earlier.decoded(place) if earlier else self._moved_pixels(today.pixels).of_size(row[2])
            tasks.append(replace(self._task(row), decoded=decoded))
        records = []
        for record in self.pool.records(tasks):
            records.append(record)
            self.progress.advance()
        again = [n for n, it in enumerate(records) if it["status"] in RULES and it["key"] in self.kept_keys]
        overruling = [replace(tasks[number], is_overruled=True) for number in again]
        for number, record in zip(again, self.pool.records(overruling), strict=True):
            records[number] = record
        return records, {places[number] for number in again}

    def _moved_pixels(self, pixels: str) -> MovedPixels:
        """Of parts that were made so far; a new file may be one that has vanished elsewhere."""
        if self._moved is None:
            self._moved = vanished_pixels(list_parts(self.manifest), pixels)
        return self._moved

    def _task(self, row: Row) -> FileTask:
        source, path, num_bytes = row
        it = self.config.sources[source]
        return FileTask(
            source, it.dataset or source, it.importer, it.root, path, num_bytes,
            tables=tables_of(it), date_pattern=it.date_pattern,
        )  # fmt: skip

    # --- what has changed ---

    def _compared(
        self, earlier: EarlierPart, places: Sequence[int], records: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Count and tell how files differ from what they were; return the records, vanished ones as they were known."""
        compared = []
        for before, record in zip(_rows_at(earlier.table, places), records, strict=True):
            was_gone, is_gone = before["status"] == "vanished", record["status"] == "vanished"
            if is_gone:
                record = vanished_row(before, record, keeps_pixels=earlier.has_todays_pixels)
            if is_gone and not was_gone:
                self._tell("vanished", record)
                self.tally.vanished[record["key"]] = f"{record['source']}/{record['path']}"
            elif was_gone and not is_gone:
                self._tell("returned", record)
            elif before["key"] != record["key"]:
                self._tell("changed", record, before=before["key"])
            compared.append(record)
        return compared

    def _tell(self, change: str, record: Mapping[str, Any], **facts: str) -> None:
        self.tally.changes[change] += 1
        self._file_event(change, key=record["key"], source=record["source"], path=record["path"], **facts)

    def _file_event(self, change: str, **facts: str) -> None:
        self.tally.num_file_events += 1
        if self.tally.num_file_events <= _MAX_FILE_EVENTS:
            self.events.write(change, **facts)

    def tell_moved(self) -> None:
        """Look for the bytes of vanished files at other paths: those were moved, not lost."""
        vanished = dict(self.tally.vanished)
        changes = self.tally.changes
        parts = list_parts(self.manifest) if vanished else []
        for part, table in readable_parts(parts, ["key", "source", "path", "status"]):
            is_here = pc.is_in(table["key"], value_set=pa.array(list(vanished), pa.string()))
            found = table.filter(pc.and_(is_here, pc.not_equal(table["status"], "vanished")))
            for row in found.to_pylist():
                if (old := vanished.pop(row["key"], None)) is not None:
                    changes["moved"] += 1
                    changes["vanished"] -= 1
                    changes["new"] -= part.name in self.tally.new_parts
                    self._file_event("moved", key=row["key"], source=row["source"], path=row["path"], before=old)


def _rows_at(table: pa.Table, places: Sequence[int]) -> Iterator[dict[str, Any]]:
    yield from table.take(pa.array(places, pa.int64())).to_pylist()


def _merged(earlier: EarlierPart | None, places: Collection[int], records: Sequence[dict[str, Any]]) -> pa.Table:
    """Return the part's table: rows taken over, and `records` in these places."""
    read = pa.Table.from_pylist(list(records), schema=MANIFEST)
    if earlier is None or len(places) == earlier.table.num_rows:
        return read
    chosen = list(range(earlier.table.num_rows))
    for number, place in enumerate(places):
        chosen[place] = earlier.table.num_rows + number
    return pa.concat_tables([earlier.table, read]).combine_chunks().take(pa.array(chosen)).combine_chunks()
