"""The journal of `dedupe apply`: what was done to source files, and taking it back.

A CSV, one line per file, on disk before the file is touched. So a line may be of a file that was not touched after all:
`undo` believes only what it finds.
"""

import csv
import errno
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from sharding.duplicates.trash import remove_trash_info
from sharding.files import replacing, sha256_file

_SHOWN = 5


class DisposalError(ValueError):
    """Files cannot be disposed of, or a journal cannot be undone; nothing was touched."""


@dataclass(frozen=True)
class Entry:
    """A line of the journal: what is done to a file, and what undoes it."""

    action: str
    path: str
    destination: str
    """Where it is now; for a hard link the keeper that it is a link to."""
    sha256: str
    mtime_ns: str
    mode: str
    """Permissions, octal."""
    reason: str
    kept_key: str
    kept_path: str


@dataclass(frozen=True)
class DisposalReport:
    """What was done, or in a dry run would be."""

    action: str
    counts: Mapping[str, int]
    """Files by drop reason."""
    num_bytes: int
    skipped: tuple[str, ...]
    """Files left alone, one line each with the reason."""
    journal: str
    is_dry_run: bool

    def summary(self) -> str:
        """Return counts, what was left alone and where the journal is."""
        done = "would be done" if self.is_dry_run else "done"
        lines = [f"{self.action}: {sum(self.counts.values()):,} files, {self.num_bytes / 1e9:,.2f} GB, {done}"]
        lines += [f"  {count:,} {reason}" for reason, count in self.counts.items()]
        lines += [f"{len(self.skipped):,} files were left alone:"] if self.skipped else []
        lines += [f"  {line}" for line in self.skipped[:_SHOWN]]
        if self.is_dry_run:
            lines.append("nothing was touched; files are read again and checked before that, --yes does it")
        elif self.journal:
            lines.append(
                f"journal: {self.journal}; `dedupe apply DATASET.toml --undo {self.journal} --yes` takes it back"
            )
        return "\n".join(lines)


def undo(journal: Path, *, dry_run: bool = True) -> DisposalReport:
    """Take back what a journal says, last line first. What has changed since, or is back already, is left alone.

    Raises DisposalError if the file is no journal, FileNotFoundError.
    """
    counts: Counter[str] = Counter()
    skipped: list[str] = []
    num_bytes = 0
    for entry in reversed(read_journal(journal)):
        try:
            size = Path(entry.destination).stat().st_size
            if problem := _take_back(entry, dry_run=dry_run):
                skipped.append(f"{entry.path}: {problem}")
                continue
        except OSError as error:
            skipped.append(f"{entry.path}: {error.strerror or error}")
            continue
        counts[entry.reason] += 1
        num_bytes += size
    return DisposalReport("undo", dict(counts.most_common()), num_bytes, tuple(skipped), "", dry_run)


class Journal:
    """Appends entries to a new CSV, each on disk before the call returns; None writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> "Journal":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("x", newline="", encoding="utf-8")
            self._writer = csv.writer(self._stream, lineterminator="\n")
            self._writer.writerow(field.name for field in fields(Entry))
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.path is not None:
            self._stream.close()

    def add(self, entry: Entry) -> None:
        self._writer.writerow(astuple(entry))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def read_journal(path: Path) -> list[Entry]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    names = [field.name for field in fields(Entry)]
    if not rows or rows[0] != names:
        raise DisposalError(f"{path}:1: is no journal of `dedupe apply`, whose first line is {','.join(names)}")
    # A line that a kill has cut short is of a file that was not touched yet.
    return [Entry(*row) for row in rows[1:] if len(row) == len(names)]


def move_file(path: Path, destination: Path) -> None:
    """Move a file; never over another one. To another disk it is copied, compared and then removed."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, destination)
    except FileExistsError:
        raise
    except OSError:  # another disk, or one without hard links
        with replacing(destination) as temporary:
            shutil.copy2(path, temporary)
            if sha256_file(temporary) != sha256_file(path):
                raise OSError(errno.EIO, f"{destination}: the copy is not the same") from None
    path.unlink()


def _take_back(entry: Entry, *, dry_run: bool) -> str:
    """Undo one line; return why not, or ""."""
    path, destination = Path(entry.path), Path(entry.destination)
    if sha256_file(destination) != entry.sha256:
        return f"{destination} is not that file any more"
    if entry.action == "hardlink":
        if not path.exists() or not path.samefile(destination):
            return "is no link to its keeper"
        if not dry_run:
            with replacing(path) as temporary:
                shutil.copyfile(destination, temporary)
                temporary.chmod(int(entry.mode, 8))
                os.utime(temporary, ns=(int(entry.mtime_ns), int(entry.mtime_ns)))
        return ""
    if path.exists():
        return "is there again"
    if not dry_run:
        move_file(destination, path)
        if entry.action == "trash":
            remove_trash_info(destination)
    return ""
