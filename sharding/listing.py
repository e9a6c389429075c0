"""Freeze which files a workspace holds, and in which part: the listing.

A listing part never changes. Files that are new since then make new parts; each file is in exactly one part, also
when several tasks freeze at once. Nothing here opens a picture.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from sharding.files import digest_of, fsync_folder, temporary_name, write_json
from sharding.images import EXTENSIONS
from sharding.schema import LISTING
from sharding.tables import list_parts, part_name, read_part, write_part

logger = logging.getLogger(__name__)

_FROZEN = "frozen.json"
_SIDECAR_EXTENSIONS = (".txt", ".json")

Row = tuple[str, str, int]
"""(source, path below its root with "/", bytes)."""


@dataclass(frozen=True)
class Problem:
    """Something below a root that cannot be listed. reason: not_utf8_name, unreadable_folder, dangling_link."""

    source: str
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Found:
    """What lies below the roots. rows: pictures, sorted by (source, path)."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    num_other_files: int
    """Files that are neither pictures by their extension nor sidecars."""
    num_linked_files: int
    """Links to files that are listed already, left out."""


def check_roots(roots: Mapping[str, Path]) -> None:
    """Raise FileNotFoundError for the first root that is no folder; else all its files would seem to have vanished."""
    for source, root in roots.items():
        if not root.is_dir():
            raise FileNotFoundError(f"sources.{source}.root: no such folder: {root}; mount it or correct the config")


def find_images(roots: Mapping[str, Path]) -> Found:
    """Walk every root, following links to files but not to folders.

    Raises FileNotFoundError for a root that is not a folder, before anything is walked.
    """
    check_roots(roots)
    rows: list[Row] = []
    links: list[Row] = []
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    for source in sorted(roots):
        _walk(source, roots[source], rows, links, problems, counts)
    num_linked_files = _add_links(roots, rows, sorted(links))
    rows.sort()
    problems.sort(key=lambda problem: (problem.source, problem.path))
    return Found(tuple(rows), tuple(problems), counts["other"], num_linked_files)


def _walk(
    source: str, root: Path, rows: list[Row], links: list[Row], problems: list[Problem], counts: Counter[str]
) -> None:
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                listed = list(entries)
        except OSError as error:
            problems.append(Problem(source, folder or ".", "unreadable_folder", error.strerror or str(error)))
            continue
        for entry in listed:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if not _is_utf8(entry.name):
                shown = os.fsencode(path).decode("utf-8", "backslashreplace")
                problems.append(Problem(source, shown, "not_utf8_name", "the name is not UTF-8: rename it"))
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif Path(entry.name).suffix.lower() not in EXTENSIONS:
                counts["other"] += not entry.name.lower().endswith(_SIDECAR_EXTENSIONS) and not entry.is_dir()
            elif entry.is_symlink():
                try:
                    if entry.is_file():
                        links.append((source, path, entry.stat().st_size))
                    elif not entry.is_dir():
                        problems.append(Problem(source, path, "dangling_link", "points to nothing"))
                except OSError as error:
                    problems.append(Problem(source, path, "dangling_link", error.strerror or str(error)))
            elif entry.is_file():
                try:
                    rows.append((source, path, entry.stat().st_size))
                except FileNotFoundError:
                    continue  # removed since the folder was read: it was never listed


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _add_links(roots: Mapping[str, Path], rows: list[Row], links: list[Row]) -> int:
    """Add those links to `rows` whose target is not listed yet; return how many were left out."""
    if not links:
        return 0
    real_roots = {source: os.path.realpath(root) for source, root in roots.items()}
    targets = {f"{real_roots[source]}/{path}" for source, path, _ in rows}
    num_left_out = 0
    for source, path, num_bytes in links:
        target = os.path.realpath(roots[source] / path)
        if target in targets:
            num_left_out += 1
        else:
            targets.add(target)
            rows.append((source, path, num_bytes))
    return num_left_out


def unlisted(rows: Iterable[Row], listing: Path) -> list[Row]:
    """Return those rows whose (source, path) stands in no part of the listing."""
    return _without(rows, list_parts(listing))


def _without(rows: Iterable[Row], parts: Iterable[Path]) -> list[Row]:
    known: set[tuple[str, str]] = set()
    for part in parts:
        table = read_part(part, ["source", "path"])
        known.update(zip(table.column("source").to_pylist(), table.column("path").to_pylist(), strict=True))
    return [row for row in rows if row[:2] not in known]


def extend_listing(listing: Path, rows: Iterable[Row], part_size: int) -> int:
    """List the rows that are not listed yet, in new parts of `part_size`; return the number of files added.

    Tasks that do this at once do not disturb each other: part n is written only by who has seen all parts before it,
    and only if no other has written it meanwhile; then the rest is looked at again.
    """
    # Parts are looked up one by one: reading a folder that grows meanwhile may show a part and not the one before it.
    num_seen = 0
    while (listing / part_name(num_seen)).exists():
        num_seen += 1
    new = _without(rows, [listing / part_name(number) for number in range(num_seen)])
    num_added = 0
    while new:
        path = listing / part_name(num_seen)
        if _write_exclusively(path, new[:part_size]):
            num_added += len(new[:part_size])
            new = new[part_size:]
        else:
            new = _without(new, [path])
        num_seen += 1
    if not is_frozen(listing):
        write_json(listing / _FROZEN, {"part_size": part_size})
    return num_added


def is_frozen(listing: Path) -> bool:
    """Tell whether some task has listed all files once; before, parts may still be on their way."""
    return (listing / _FROZEN).is_file()


def _write_exclusively(path: Path, rows: list[Row]) -> bool:
    columns = list(zip(*rows, strict=True))
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, LISTING, strict=True)], LISTING)
    temporary = temporary_name(path)
    write_part(temporary, table, made_from=digest_of(rows))
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
    table = read_part(part, LISTING.names)
    return list(zip(*(table.column(name).to_pylist() for name in LISTING.names), strict=True))
