"""Walk the roots of the sources and find the pictures below them, in tars, too.

Follows links to files, each file once, and never to folders. What cannot be listed is a problem with a reason. Nothing
here opens a picture; which of them are new is `listing`'s.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sharding.images import EXTENSIONS
from sharding.scanning.listing import FILES, Row, check_roots, listing_table
from sharding.sources import index_tar

_SIDECAR_EXTENSIONS = (".txt", ".json", ".jsonl")
_MASK_MEMBER = ".mask.png"
_FLUSH_ROWS = 65_536


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


NOTHING = Found(FILES.empty_table(), (), 0, 0)


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
                self._problem(folder or ".", error, reason="unreadable_folder")
        self._flush()
        return pa.concat_tables(self.batches)

    def _enter(self, folder: str, entry: os.DirEntry[str]) -> str:
        """Take note of an entry; return its path if it is a folder to walk, else ""."""
        path = f"{folder}/{entry.name}" if folder else entry.name
        ending = _ending(entry.name)
        if not _is_utf8(entry.name):
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            self.problems.append(Problem(self.source, shown, reason="not_utf8_name", detail="not UTF-8: rename it"))
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
                self.problems.append(Problem(self.source, path, reason="dangling_link", detail="points to nothing"))
        except OSError as error:
            self._problem(path, error, reason="dangling_link")

    def _add_members(self, tar: str) -> None:
        try:
            index = index_tar(self.root / tar)
        except OSError as error:
            self._problem(tar, error, reason="unreadable_tar")
            return
        for name, reason, detail in index.problems:
            self.problems.append(Problem(self.source, f"{tar}/{name}" if name else tar, reason, detail))
        for name, (_, num_bytes) in index.members.items():
            ending = _ending(name)
            if ending in EXTENSIONS and not name.lower().endswith(_MASK_MEMBER):
                self._add(f"{tar}/{name}", num_bytes)
            else:
                self.num_other_files += ending not in _SIDECAR_EXTENSIONS

    def _problem(self, path: str, error: OSError, *, reason: str) -> None:
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
