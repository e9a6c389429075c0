"""Freeze which files a workspace holds, and in which part: the listing.

A listing part never changes. Files that are new since then make new parts; each file is in exactly one part, also
when several tasks freeze at once. How files are found is `walk`'s. Rows are Arrow tables: millions of names as Python
objects would not fit.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.files import digest_of, fsync_folder, temporary_name, write_json
from sharding.schema import LISTING
from sharding.tables import list_parts, part_name, read_part, write_part

_FROZEN = "frozen.json"
_ROWS_PER_LOOKUP = 500_000

Row = tuple[str, str, int]
"""(source, path below its root with "/", bytes)."""

FILES = pa.schema([("source", pa.string()), ("path", pa.large_string()), ("num_bytes", pa.int64())])
"""LISTING in memory: all paths of a source may be more than the 2 GB that a `string` array can hold."""


def check_roots(roots: Mapping[str, Path]) -> None:
    """Raise FileNotFoundError for the first root that is no folder; else all its files would seem to have vanished."""
    for source, root in roots.items():
        if not root.is_dir():
            raise FileNotFoundError(f"sources.{source}.root: no such folder: {root}; mount it or correct the config")


def listing_table(rows: Collection[Row]) -> pa.Table:
    """Return rows as a table such as `find_images` gives."""
    columns = list(zip(*rows, strict=True)) or [()] * len(FILES)
    return pa.table([pa.array(column, part.type) for column, part in zip(columns, FILES, strict=True)], FILES)


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
    return pa.concat_tables(tables).cast(pa.schema([FILES.field("source"), FILES.field("path")]))


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
