"""scan: every file of every source becomes one row of the manifest.

Freezes the listing (`listing`), then makes each part of the manifest from the part of the same name: every file is
read once, in worker processes (`record`). What belongs to which command line is in `cli`.

    python -m sharding scan configs/datasets/X.toml --workspace W --workers 8
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import DatasetConfig
from sharding.files import LEFT_OVER_SECONDS, digest_of, remove_temporaries
from sharding.images import BrokenFractionError, is_too_broken
from sharding.listing import Found, Row, check_roots, extend_listing, find_images, is_frozen, read_listing, unlisted
from sharding.metadata import sidecar_paths
from sharding.record import BROKEN, FileTask, Rules, make_record
from sharding.runlog import EventLog, Progress
from sharding.schema import MANIFEST, Workspace
from sharding.tables import is_current, list_parts, owned_parts, read_part, write_part
from sharding.workers import make_pool

logger = logging.getLogger(__name__)

SCAN_VERSION = 1
"""Raised when the code would make other rows from the same files."""

_FILES_PER_BATCH = 16


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
    sources are walked for new files unless this is a later task of several and the listing exists.

    Raises FileNotFoundError for a missing source folder before anything is written, ValueError for a part_index out
    of range, and BrokenFractionError, after all parts are written, when `is_too_broken` says so of this task's files
    that are undecodable, not_an_image, empty_file or unreadable.
    """
    owned_parts([], part_index, num_parts)  # refuses a wrong share before any work
    events = EventLog(workspace.events, stage="scan")
    roots = {name: source.root for name, source in config.sources.items()}
    found = Found((), (), 0, 0)
    num_new_files = 0
    check_roots(roots)
    if part_index == 0 or not is_frozen(workspace.listing):
        found = find_images(roots)
        if dry_run:
            num_new_files = len(unlisted(found.rows, workspace.listing))
        else:
            num_new_files = extend_listing(workspace.listing, found.rows, config.part_size)
            for problem in found.problems:
                logger.warning("%s/%s: %s: %s", problem.source, problem.path, problem.reason, problem.detail)
                events.write("not_listed", **vars(problem))
    counts: Counter[str] = Counter()
    broken_keys: list[str] = []
    to_make: list[tuple[Path, list[Row], str]] = []
    if not dry_run:
        for folder in (workspace.listing, workspace.manifest):
            remove_temporaries(folder, min_age_seconds=LEFT_OVER_SECONDS)
    parts = owned_parts(list_parts(workspace.listing), part_index, num_parts)
    for part in parts:
        rows = read_listing(part)
        _refuse_unknown_sources(config, rows)
        made_from = part_digest(config, rows)
        target = workspace.manifest / part.name
        if is_current(target, made_from):
            _count(read_part(target, ["status", "key", "source", "path"]), counts, broken_keys)
        else:
            to_make.append((target, rows, made_from))
    if not dry_run:
        _make_parts(config, to_make, workers, events, counts, broken_keys)
    new_parts = -(-num_new_files // config.part_size) if dry_run else 0
    report = ScanReport(
        num_files=sum(counts.values()),
        status_counts=dict(sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))),
        parts_made=len(to_make) + new_parts,
        parts_current=len(parts) - len(to_make),
        num_new_files=num_new_files,
        num_other_files=found.num_other_files,
        num_linked_files=found.num_linked_files,
        problems=tuple(f"{p.source}/{p.path}: {p.reason}: {p.detail}" for p in found.problems),
        is_dry_run=dry_run,
    )
    if not dry_run:
        events.write("done", files=report.num_files, statuses=dict(report.status_counts), parts_made=len(to_make))
        _refuse_broken(config, counts, broken_keys)
    return report


def part_digest(config: DatasetConfig, rows: Sequence[Row]) -> str:
    """Return the digest of all that the manifest part of these listing rows depends on.

    That is: the rows; size and modification time of each file and of each of its possible sidecars; importer and
    dataset of the sources in the part; filters; algorithm and size of the hash; SCAN_VERSION. A changed file or
    sidecar therefore re-makes its part and no other; moving a whole source to another root does not.
    """
    stamps = []
    for source, path, _ in rows:
        root = config.sources[source].root
        stamps.append([_stamp(file) for file in (root / path, *sidecar_paths(root, PurePosixPath(path)))])
    used = sorted({source for source, _, _ in rows})
    return digest_of(
        {
            "version": SCAN_VERSION,
            "rows": list(rows),
            "stamps": stamps,
            "sources": [[name, config.sources[name].importer, config.sources[name].dataset] for name in used],
            "filters": config.filters.model_dump(mode="json"),
            "hash": [config.dedupe.algorithm, config.dedupe.hash_size],
        }
    )


def _refuse_unknown_sources(config: DatasetConfig, rows: Sequence[Row]) -> None:
    if unknown := sorted({source for source, _, _ in rows} - set(config.sources)):
        raise ValueError(
            f"sources.{unknown[0]}: the listing holds files of this source, but the config no longer has it; "
            "put it back, or start a new workspace"
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116  (five per file: Path.stat is twice as slow)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _make_parts(
    config: DatasetConfig,
    to_make: Sequence[tuple[Path, list[Row], str]],
    workers: int,
    events: EventLog,
    counts: Counter[str],
    broken_keys: list[str],
) -> None:
    rules = Rules(filters=config.filters, dedupe=config.dedupe)
    num_files = sum(len(rows) for _, rows, _ in to_make)
    with Progress(num_files, unit="files", title="scan") as progress, _Workers(workers, rules) as pool:
        for target, rows, made_from in to_make:
            records = []
            for record in pool.records([_task(config, row) for row in rows]):
                records.append(record)
                progress.advance()
            table = pa.Table.from_pylist(records, schema=MANIFEST)
            write_part(target, table, made_from=made_from)
            _count(table, counts, broken_keys)
            statuses = Counter(record["status"] for record in records)
            events.write("part", part=target.name, files=len(records), statuses=dict(sorted(statuses.items())))


def _task(config: DatasetConfig, row: Row) -> FileTask:
    source, path, num_bytes = row
    settings = config.sources[source]
    return FileTask(source, settings.dataset or source, settings.importer, settings.root, path, num_bytes)


def _count(table: pa.Table, counts: Counter[str], broken_keys: list[str]) -> None:
    for entry in pc.value_counts(table.column("status")).to_pylist():
        counts[entry["values"]] += entry["counts"]
    broken = table.filter(pc.is_in(table.column("status"), value_set=pa.array(BROKEN)))
    for row in broken.slice(0, 5).select(["key", "source", "path"]).to_pylist():
        broken_keys.append(f"{row['key'] or '(no key)'} {row['source']}/{row['path']}")


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


# --- worker processes ---


def _make_batch(tasks: Sequence[FileTask], rules: Rules) -> list[dict[str, Any]]:
    return [make_record(task, rules) for task in tasks]


class _Workers:
    """Makes records in order, in processes or (workers = 0) here. A file that kills its process costs only itself."""

    def __init__(self, workers: int, rules: Rules) -> None:
        self.workers = workers
        self.rules = rules
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def records(self, tasks: Sequence[FileTask]) -> Iterator[dict[str, Any]]:
        if self.workers == 0:
            yield from (make_record(task, self.rules) for task in tasks)
            return
        batches = [tasks[start : start + _FILES_PER_BATCH] for start in range(0, len(tasks), _FILES_PER_BATCH)]
        while batches:
            futures = [self._submit(batch) for batch in batches]
            num_done = 0
            for batch, future in zip(batches, futures, strict=True):
                num_done += 1
                try:
                    if future is None:
                        raise BrokenProcessPool
                    yield from future.result()
                except BrokenProcessPool:
                    self._close()
                    yield from [self._record_alone(task) for task in batch]
                    self._close()
                    break  # what was in flight is lost: hand it in again
            batches = batches[num_done:]

    def _submit(self, batch: Sequence[FileTask]) -> Future[list[dict[str, Any]]] | None:
        try:
            return self._open(self.workers).submit(_make_batch, batch, self.rules)
        except BrokenProcessPool:
            return None  # a batch before it killed a process while this one was handed in

    def _record_alone(self, task: FileTask) -> dict[str, Any]:
        try:
            return self._open(1).submit(_make_batch, [task], self.rules).result()[0]
        except BrokenProcessPool:
            self._close()
            logger.warning("%s/%s killed the process that decoded it", task.source, task.path)
            return make_record(task, self.rules, decode=False)

    def _open(self, workers: int) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = make_pool(workers)
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
