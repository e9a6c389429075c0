"""Make one part of the manifest from the part of the listing of the same name, reading only what has changed.

What may be taken over says `takeover`; what a record is, `record`. Tells what has become of files since they were
scanned last. Which parts there are to make is `scan`'s.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import DatasetConfig
from sharding.runlog import EventLog, Progress
from sharding.scanning.filters import RULES
from sharding.scanning.listing import Row, read_listing
from sharding.scanning.record import BROKEN, FileTask
from sharding.scanning.record_pool import RecordPool
from sharding.scanning.takeover import (
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
from sharding.schema import DECISIONS, MANIFEST, Workspace
from sharding.tables import is_current, list_parts, read_part, read_parts, write_part

_KEEPING = ("keep", "preferred_keeper", "not_a_duplicate")
"""Decisions that overrule the filters."""
CHANGES = ("new", "changed", "moved", "vanished", "returned")
_MAX_FILE_EVENTS = 1_000
"""Changed, vanished and moved files that get an event each; the manifest has them all."""


@dataclass
class Tally:
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


class PartMaker:
    """Makes manifest parts from listing parts, one after the other."""

    def __init__(
        self, config: DatasetConfig, workspace: Workspace, pool: RecordPool, progress: Progress, events: EventLog,
        tally: Tally,
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


def _kept_keys(workspace: Workspace) -> frozenset[str]:
    """Return the keys that people keep whatever the filters say."""
    decisions = read_parts(workspace.decisions, ["key", "decision"], schema=DECISIONS)
    is_keeping = pc.is_in(decisions["decision"], value_set=pa.array(_KEEPING))
    return frozenset(decisions["key"].filter(is_keeping).to_pylist())
