"""scan: every file of every source becomes one row of the manifest.

Looks for files (`walk`), freezes which of them is in which part (`listing`), then makes each part of the manifest
from the part of the same name (`manifest_part`). What belongs to which command line is in `commands`.

    python -m sharding scan configs/datasets/X.toml --workspace W --workers 8
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from sharding.config import DatasetConfig
from sharding.files import LEFT_OVER_SECONDS, remove_temporaries
from sharding.images import BrokenFractionError, is_too_broken
from sharding.metadata import check_tables
from sharding.runlog import EventLog, Progress
from sharding.scanning.listing import check_roots, extend_listing, is_frozen, unlisted
from sharding.scanning.manifest_part import CHANGES, PartMaker, Tally
from sharding.scanning.record import BROKEN, Rules
from sharding.scanning.record_pool import RecordPool
from sharding.scanning.takeover import STAMPS_FOLDER, tables_of
from sharding.scanning.walk import NOTHING, find_images
from sharding.schema import Workspace
from sharding.tables import list_parts, owned_parts, read_part

logger = logging.getLogger(__name__)


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
    tally = Tally()
    with Progress(num_files, unit="files", title="scan") as progress, RecordPool(workers, rules) as pool:
        maker = PartMaker(config, workspace, pool, progress, events, tally)
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
