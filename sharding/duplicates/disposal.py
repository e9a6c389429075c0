"""dedupe apply: move, hard-link or trash the source files that dedupe dropped for another one.

The only place that touches sources, and only when asked. Before a file is touched it is read again, and so is its
keeper: both must be what was scanned. Links, and members of tars, are never touched. What is done is in the journal
(`journal`), which undoes it. Sidecars stay where they are.

    python -m sharding dedupe apply configs/datasets/X.toml --move DIR --yes
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharding.config import DatasetConfig
from sharding.dedupe import is_dedupe_current
from sharding.duplicates.journal import DisposalError, DisposalReport, Entry, Journal, move_file
from sharding.duplicates.trash import trash_place, write_trash_info
from sharding.files import fsync_folder, sha256_file, temporary_name
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.runlog import Progress
from sharding.schema import DROPS, MANIFEST, Workspace
from sharding.tables import list_parts

Action = Literal["move", "hardlink", "trash"]
REASONS = ("identical_bytes", "near_duplicate", "turned_copy", "cropped_copy", "duplicate_of_reference")
"""Drops that may be disposed of. A better copy of a planned picture is not among them: one may yet want it."""


@dataclass(frozen=True)
class _Drop:
    path: Path
    name: str
    """SOURCE/PATH."""
    sha256: str
    num_bytes: int
    reason: str
    kept_key: str
    kept_path: Path
    kept_sha256: str


def dispose(
    config: DatasetConfig,
    workspace: Workspace,
    *,
    action: Action,
    journal: Path,
    folder: Path | None = None,
    reasons: Sequence[str] = REASONS,
    dry_run: bool = True,
) -> DisposalReport:
    """Act on every dropped source file of the given reasons; `hardlink` only on identical bytes.

    folder: where `move` moves to, as FOLDER/SOURCE/PATH. journal: a new CSV. Raises DisposalError when dedupe is not
    current or an argument is wrong, before anything is touched; a single file that cannot be handled is left alone.
    """
    if unknown := sorted(set(reasons) - set(REASONS)):
        raise DisposalError(f"--reason {unknown[0]}: must be one of {', '.join(REASONS)}")
    if (action == "move") != (folder is not None):
        raise DisposalError("a folder is given for --move, and only for it")
    if not is_dedupe_current(config, workspace):
        raise DisposalError("files, settings or decisions have changed since; run `python -m sharding dedupe` first")
    if journal.exists():
        raise DisposalError(f"{journal}: exists; name a new journal")
    wanted = ("identical_bytes",) if action == "hardlink" else tuple(reasons)
    counts: Counter[str] = Counter()
    skipped: list[str] = []
    checked: dict[Path, str] = {}
    num_bytes = 0
    drops = list(_drops(config, workspace, wanted))
    with Journal(None if dry_run else journal) as lines, Progress(len(drops), unit="files", title=action) as progress:
        for drop in drops:
            progress.advance()
            try:
                if problem := _problem(drop, action, checked, reads=not dry_run):
                    skipped.append(f"{drop.name}: {problem}")
                    continue
                if not dry_run:
                    _act(drop, action, folder, lines)
            except OSError as error:
                skipped.append(f"{drop.name}: {error.strerror or error}")
                continue
            counts[drop.reason] += 1
            num_bytes += drop.num_bytes
    return DisposalReport(
        action, dict(counts.most_common()), num_bytes, tuple(skipped), "" if dry_run else str(journal), dry_run
    )


# --- what is to be done ---


def _drops(config: DatasetConfig, workspace: Workspace, reasons: Sequence[str]) -> Iterator[_Drop]:
    references = [name for name, source in config.sources.items() if source.is_reference]
    manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
    among = ", ".join(map(quoted, references)) or "''"
    with Questions() as questions:
        rows = questions.ask(
            f"""
            with keepers as (
                select key, source, path, sha256 from {rows_of(list_parts(workspace.kept), MANIFEST)}
                union all
                select key, arg_min(source, (source, path)), arg_min(path, (source, path)), any_value(sha256)
                from {manifest} where source in ({among}) and status = 'kept' group by key)
            select drops.source, drops.path, drops.reason, kept_key, manifest.sha256, manifest.num_bytes,
                keepers.source as kept_source, keepers.path as kept_path, keepers.sha256 as kept_sha256
            from {rows_of(list_parts(workspace.dedupe / "drops"), DROPS)} as drops
            join {manifest} as manifest on manifest.source = drops.source and manifest.path = drops.path
            join keepers on keepers.key = drops.kept_key
            where reason in ({", ".join(map(quoted, reasons))}) order by drops.source, drops.path
            """
        )
    for row in rows:
        if row["source"] in references:
            continue
        yield _Drop(
            (config.sources[row["source"]].root / row["path"]).absolute(), f"{row['source']}/{row['path']}",
            row["sha256"], row["num_bytes"], row["reason"], row["kept_key"],
            (config.sources[row["kept_source"]].root / row["kept_path"]).absolute(), row["kept_sha256"],
        )  # fmt: skip


def _problem(drop: _Drop, action: Action, checked: dict[Path, str], *, reads: bool) -> str:
    """Say why a file must be left alone, or ""."""
    for path, what in ((drop.path, "it"), (drop.kept_path, f"its keeper {drop.kept_path}")):
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return f"{what} is gone, or is in a tar"
        if not stat.S_ISREG(status.st_mode):
            return f"{what} is no plain file"
    if drop.path.samefile(drop.kept_path):
        if action == "hardlink":
            return "is a hard link to its keeper already"
        is_same_name = drop.path.name == drop.kept_path.name and drop.path.parent.samefile(drop.kept_path.parent)
        if is_same_name or status.st_nlink == 1:
            return "is its keeper: two sources hold the same folder"
    if not reads:
        return ""
    if drop.kept_path not in checked:
        checked[drop.kept_path] = sha256_file(drop.kept_path)
    if checked[drop.kept_path] != drop.kept_sha256:
        return f"its keeper {drop.kept_path} has changed since it was scanned"
    if sha256_file(drop.path) != drop.sha256:
        return "has changed since it was scanned"
    return ""


# --- doing it ---


def _act(drop: _Drop, action: Action, folder: Path | None, journal: Journal) -> None:
    status = drop.path.stat()
    if action == "hardlink":
        destination = drop.kept_path
    elif action == "trash":
        destination = trash_place(drop.path)
    else:
        assert folder is not None
        destination = (folder / drop.name).absolute()
        if destination.exists():
            raise FileExistsError(errno.EEXIST, f"{destination} exists already")
    journal.add(
        Entry(action, str(drop.path), str(destination), drop.sha256, str(status.st_mtime_ns),
              oct(stat.S_IMODE(status.st_mode)), drop.reason, drop.kept_key, str(drop.kept_path))
    )  # fmt: skip
    if action == "hardlink":
        temporary = temporary_name(drop.path)
        os.link(drop.kept_path, temporary)
        os.replace(temporary, drop.path)
    else:
        if action == "trash":
            write_trash_info(destination, drop.path)
        move_file(drop.path, destination)
    fsync_folder(drop.path.parent)
