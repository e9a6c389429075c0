"""Freeze which files a workspace holds, and in which part: the listing.

A listing part never changes. Files that are new since then make new parts; each file is in exactly one part, also
when several tasks freeze at once. Nothing here opens a picture. Rows are Arrow tables: millions of names as Python
objects would not fit.
"""

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.files import digest_of, fsync_folder, temporary_name, write_json
from sharding.images import EXTENSIONS
from sharding.schema import LISTING
from sharding.sources import index_tar
from sharding.tables import list_parts, part_name, read_part, write_part

logger = logging.getLogger(__name__)

_FROZEN = "frozen.json"
_SIDECAR_EXTENSIONS = (".txt", ".json", ".jsonl")
_MASK_MEMBER = ".mask.png"
_FLUSH_ROWS = 65_536
_ROWS_PER_LOOKUP = 500_000

Row = tuple[str, str, int]
"""(source, path below its root with "/", bytes)."""

_WIDE = pa.schema([("source", pa.string()), ("path", pa.large_string()), ("num_bytes", pa.int64())])
"""LISTING in memory: all paths of a source may be more than the 2 GB that a `string` array can hold."""


@dataclass(frozen=True)
class Problem:
    """Something below a root that cannot be listed.

    reason: not_utf8_name, unreadable_folder, dangling_link, unreadable_tar, damaged_tar, unsafe_name.
    """

    source: str
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Found:
    """What lies below the roots. rows: pictures, columns of LISTING, sorted by (source, path)."""

    rows: pa.Table
    problems: tuple[Problem, ...]
    num_other_files: int
    """Files that are neither pictures by their extension nor sidecars."""
    num_linked_files: int
    """Links to files that are listed already, left out."""


NOTHING = Found(_WIDE.empty_table(), (), 0, 0)


def check_roots(roots: Mapping[str, Path]) -> None:
    """Raise FileNotFoundError for the first root that is no folder; else all its files would seem to have vanished."""
    for source, root in roots.items():
        if not root.is_dir():
            raise FileNotFoundError(f"sources.{source}.root: no such folder: {root}; mount it or correct the config")


def find_images(roots: Mapping[str, Path], *, with_tars: Collection[str] = ()) -> Found:
    """Walk every root, following links to files but not to folders.

    with_tars: sources whose tars are looked into; their members are listed as TAR/MEMBER.
    Raises FileNotFoundError for a root that is not a folder, before anything is walked.
    """
    check_roots(roots)
    walks = [_Walk(source, roots[source], looks_into_tars=source in with_tars) for source in sorted(roots)]
    tables = {walk.source: walk.run() for walk in walks}
    links = sorted(link for walk in walks for link in walk.links)
    added = _new_links(roots, tables, links)
    rows = pa.concat_tables([_sorted_rows([tables[source], listing_table(added.get(source, []))]) for source in tables])
    problems = sorted((p for walk in walks for p in walk.problems), key=lambda problem: (problem.source, problem.path))
    num_linked_files = len(links) - sum(map(len, added.values()))
    return Found(rows, tuple(problems), sum(walk.num_other_files for walk in walks), num_linked_files)


@dataclass
class _Walk:
    """One walk through a root."""

    source: str
    root: Path
    looks_into_tars: bool
    rows: list[Row] = field(default_factory=list)
    """Not yet in a batch."""
    batches: list[pa.Table] = field(default_factory=list)
    links: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    num_other_files: int = 0

    def run(self) -> pa.Table:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        if is_folder := self._enter(folder, entry):
                            folders.append(is_folder)
            except OSError as error:
                self._problem(folder or ".", "unreadable_folder", error)
        self._flush()
        return pa.concat_tables(self.batches)

    def _enter(self, folder: str, entry: os.DirEntry[str]) -> str:
        """Take note of an entry; return its path if it is a folder to walk, else ""."""
        path = f"{folder}/{entry.name}" if folder else entry.name
        ending = _ending(entry.name)
        if not _is_utf8(entry.name):
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            self.problems.append(Problem(self.source, shown, "not_utf8_name", "the name is not UTF-8: rename it"))
        elif entry.is_dir(follow_symlinks=False):
            return path
        elif ending == ".tar" and self.looks_into_tars:
            self._add_members(path)
        elif ending not in EXTENSIONS:
            self.num_other_files += ending not in _SIDECAR_EXTENSIONS and not entry.is_dir()
        elif entry.is_symlink():
            self._add_link(path, entry)
        elif entry.is_file():
            try:
                self._add(path, entry.stat().st_size)
            except FileNotFoundError:
                return ""  # removed since the folder was read: it was never listed
        return ""

    def _add(self, path: str, num_bytes: int) -> None:
        self.rows.append((self.source, path, num_bytes))
        if len(self.rows) >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        self.batches.append(listing_table(self.rows))
        self.rows.clear()

    def _add_link(self, path: str, entry: os.DirEntry[str]) -> None:
        try:
            if entry.is_file():
                self.links.append((self.source, path, entry.stat().st_size))
            elif not entry.is_dir():
                self.problems.append(Problem(self.source, path, "dangling_link", "points to nothing"))
        except OSError as error:
            self._problem(path, "dangling_link", error)

    def _add_members(self, tar: str) -> None:
        try:
            index = index_tar(self.root / tar)
        except OSError as error:
            self._problem(tar, "unreadable_tar", error)
            return
        for name, reason, detail in index.problems:
            self.problems.append(Problem(self.source, f"{tar}/{name}" if name else tar, reason, detail))
        for name, (_, num_bytes) in index.members.items():
            ending = _ending(name)
            if ending in EXTENSIONS and not name.lower().endswith(_MASK_MEMBER):
                self._add(f"{tar}/{name}", num_bytes)
            else:
                self.num_other_files += ending not in _SIDECAR_EXTENSIONS

    def _problem(self, path: str, reason: str, error: OSError) -> None:
        self.problems.append(Problem(self.source, path, reason, error.strerror or str(error)))


def _ending(name: str) -> str:
    """Return PurePosixPath(name).suffix in lower case, at a fifth of the cost."""
    place = name.rfind(".")
    return name[place:].lower() if place > name.rfind("/") + 1 else ""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def listing_table(rows: Collection[Row]) -> pa.Table:
    """Return rows as a table such as `find_images` gives."""
    columns = list(zip(*rows, strict=True)) or [()] * len(_WIDE)
    return pa.table([pa.array(column, part.type) for column, part in zip(columns, _WIDE, strict=True)], _WIDE)


def _sorted_rows(tables: Iterable[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    order = pc.sort_indices(table.column("path"))
    return table.take(order)


def _new_links(roots: Mapping[str, Path], tables: Mapping[str, pa.Table], links: list[Row]) -> dict[str, list[Row]]:
    """Return by source those links whose target is listed neither itself nor through a link before."""
    if not links:
        return {}
    real_roots = {source: os.path.realpath(root) for source, root in roots.items()}
    targets = [os.path.realpath(roots[source] / path) for source, path, _ in links]
    seen: set[str] = set()
    for source, root in real_roots.items():
        below = [target[len(root) + 1 :] for target in targets if target.startswith(f"{root}/")]
        paths = tables[source].column("path")
        listed = paths.filter(pc.is_in(paths, value_set=pa.array(below, pa.large_string())))
        seen.update(f"{root}/{path}" for path in listed.to_pylist())
    added: dict[str, list[Row]] = {}
    for link, target in zip(links, targets, strict=True):
        if target not in seen:
            seen.add(target)
            added.setdefault(link[0], []).append(link)
    return added


def unlisted(rows: pa.Table, listing: Path) -> pa.Table:
    """Return those rows whose (source, path) stands in no part of the listing."""
    return _without(rows, list_parts(listing))


def _without(rows: pa.Table, parts: Iterable[Path]) -> pa.Table:
    is_new = np.ones(rows.num_rows, dtype=bool)
    for known in _batches(parts):
        for source in pc.unique(known.column("source")).to_pylist():
            listed = known.filter(pc.equal(known.column("source"), source)).column("path")
            is_listed = pc.and_(pc.equal(rows.column("source"), source), pc.is_in(rows.column("path"), listed))
            is_new &= ~np.asarray(is_listed)
    return rows if is_new.all() else rows.filter(pa.array(is_new))


def _batches(parts: Iterable[Path]) -> Iterator[pa.Table]:
    """Yield the listing's rows about a million at a time, so that memory for looking up does not grow with it."""
    tables: list[pa.Table] = []
    for part in parts:
        tables.append(read_part(part, ["source", "path"]))
        if sum(table.num_rows for table in tables) >= _ROWS_PER_LOOKUP:
            yield _joined(tables)
            tables = []
    if tables:
        yield _joined(tables)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).cast(pa.schema([_WIDE.field("source"), _WIDE.field("path")]))


def extend_listing(listing: Path, rows: pa.Table, part_size: int) -> int:
    """List the rows that are not listed yet, in new parts of `part_size`; return the number of files added.

    rows: columns of LISTING, each (source, path) once. Tasks that do this at once do not disturb each other: part n
    is written only by who has seen all parts before it, and only if no other has written it meanwhile; then the rest
    is looked at again.
    """
    # Parts are looked up one by one: reading a folder that grows meanwhile may show a part and not the one before it.
    num_seen = 0
    while (listing / part_name(num_seen)).exists():
        num_seen += 1
    new = _without(rows, [listing / part_name(number) for number in range(num_seen)])
    num_added = 0
    while new.num_rows:
        path = listing / part_name(num_seen)
        if _write_exclusively(path, new.slice(0, part_size)):
            num_added += min(part_size, new.num_rows)
            new = new.slice(part_size)
        else:
            new = _without(new, [path])
        num_seen += 1
    if not is_frozen(listing):
        write_json(listing / _FROZEN, {"part_size": part_size})
    return num_added


def is_frozen(listing: Path) -> bool:
    """Tell whether some task has listed all files once; before, parts may still be on their way."""
    return (listing / _FROZEN).is_file()


def _write_exclusively(path: Path, rows: pa.Table) -> bool:
    table = rows.combine_chunks().cast(LISTING)
    temporary = temporary_name(path)
    write_part(temporary, table, made_from=digest_of(list(_rows(table))))
    try:
        os.link(temporary, path)  # unlike a rename, this fails when another task was first
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    fsync_folder(path.parent)
    return True


def read_listing(part: Path) -> list[Row]:
    """Return the rows of one part of the listing."""
    return list(_rows(read_part(part, LISTING.names)))


def _rows(table: pa.Table) -> Iterator[Row]:
    yield from zip(*(table.column(name).to_pylist() for name in LISTING.names), strict=True)
