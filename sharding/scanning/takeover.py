"""What of an earlier manifest part still holds: rows of files that have not changed, pixels of bytes that have not.

Beside each manifest part lies a hidden one, `.stamps/part-00012.parquet`, with a stamp for each row: a digest of the
file's and its sidecars' bytes and times and of the settings of its source. A row whose stamp is today's is taken over;
the others are read again. Of those, what was made from pixels is taken over where the bytes are still the same.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import DatasetConfig, SourceConfig
from sharding.files import digest_of
from sharding.metadata import NO_TABLES, Tables, fingerprint, sidecar_paths
from sharding.scanning.filters import RULES
from sharding.scanning.listing import Row
from sharding.scanning.record import DECODED, Decoded, pixel_settings
from sharding.schema import MANIFEST
from sharding.sources import stamp_file
from sharding.tables import DamagedPartError, part_metadata, read_part, schema_mismatch, write_part

SCAN_VERSION = 2
"""Raised when the code would make other rows from the same files."""

STAMPS_FOLDER = ".stamps"
STAMPS = pa.schema([("stamp", pa.binary(16)), ("is_overruled", pa.bool_())])
_MAX_MOVED = 500_000
"""Vanished rows whose pixels are remembered; more moved files than that are decoded again."""


def tables_of(source: SourceConfig) -> Tables:
    return Tables(source.metadata, source.tag_dict, source.tag_categories)


@dataclass(frozen=True)
class Stamps:
    """Stamps of the rows of one part, as files and settings are now. pixels: digest of the settings of DECODED."""

    rows: Sequence[Row]
    stamps: Sequence[bytes]
    pixels: str

    def made_from(self, overruled_keys: Collection[str]) -> str:
        """Return the digest of all that the manifest part depends on.

        overruled_keys: of its rows that are kept against the filters, because a person says so.
        """
        files = [[*row[:2], stamp.hex()] for row, stamp in zip(self.rows, self.stamps, strict=True)]
        return digest_of({"files": files, "overruled": sorted(overruled_keys)})


def stamp_rows(config: DatasetConfig, rows: Sequence[Row]) -> Stamps:
    """Look at the files of a listing part.

    A stamp holds size and time of the file and of each of its possible sidecars, what its source's tables say about
    it, its source's settings, the filters, the settings of the hash, and SCAN_VERSION. A source's root is not part of
    it: a source may move as a whole.
    """
    pixels = digest_of(pixel_settings(config.dedupe))
    settings = {
        name: digest_of([SCAN_VERSION, source.importer, source.dataset, source.date_pattern, pixels,
                         config.filters.model_dump(mode="json")])
        for name, source in config.sources.items()
    }  # fmt: skip
    tables = {name: tables_of(source) for name, source in config.sources.items()}
    roots = {name: str(source.root) for name, source in config.sources.items()}
    stamps = []
    for name, path, _ in rows:
        files = [stamp_file(f"{roots[name]}/{file}") for file in (path, *sidecar_paths(path))]
        said = "" if tables[name] == NO_TABLES else fingerprint(tables[name], Path(roots[name]), PurePosixPath(path))
        facts = repr((settings[name], files, said))
        stamps.append(hashlib.sha256(facts.encode()).digest()[:16])
    return Stamps(rows, stamps, pixels)


@dataclass(frozen=True)
class EarlierPart:
    """A manifest part as an earlier scan left it. stamps: None where its hidden part is missing or of another time."""

    table: pa.Table
    stamps: Sequence[bytes] | None
    is_overruled: Sequence[bool]
    has_todays_pixels: bool

    def unchanged(self, today: Stamps, kept_keys: Collection[str]) -> list[bool]:
        """Tell for each row whether it may be taken over: neither its stamp nor a decision about it has changed."""
        if self.stamps is None:
            return [False] * self.table.num_rows
        wanted = _wants_overruling(self.table, self.is_overruled, kept_keys)
        rows = zip(self.stamps, today.stamps, wanted, self.is_overruled, strict=True)
        return [before == now and wants == was for before, now, wants, was in rows]

    def decoded(self, place: int) -> tuple[Decoded, ...]:
        """Return what was made from the pixels of a row's file, as far as it is of use today."""
        if not self.has_todays_pixels:
            return ()
        row = self.table.slice(place, 1).select(["sha256", *DECODED]).to_pylist()[0]
        sha256 = row.pop("sha256")
        return (Decoded(sha256, row),) if row["phash"] else ()


def read_earlier(target: Path, pixels: str) -> EarlierPart | None:
    """Read a manifest part and its stamps; None when there is none, or none that this version could have written."""
    try:
        table = read_part(target)
        if schema_mismatch(table, MANIFEST):
            return None
        table = table.select(MANIFEST.names).cast(MANIFEST)
        made_from = part_metadata(target)["made_from"]
    except (FileNotFoundError, DamagedPartError):
        return None
    none_overruled = [False] * table.num_rows
    hidden = stamps_path(target)
    try:
        facts, stamps = part_metadata(hidden), read_part(hidden)
    except (FileNotFoundError, DamagedPartError):
        return EarlierPart(table, None, none_overruled, False)
    if facts.get("made_from") != made_from or schema_mismatch(stamps, STAMPS) or stamps.num_rows != table.num_rows:
        return EarlierPart(table, None, none_overruled, False)
    return EarlierPart(
        table, stamps["stamp"].to_pylist(), stamps["is_overruled"].to_pylist(), facts.get("pixels") == pixels
    )


def overruled_today(target: Path, kept_keys: Collection[str]) -> list[str]:
    """Return the keys of a part that today's decisions keep against the filters; [] for a part that is not there."""
    earlier = read_earlier(target, "") if kept_keys else None
    if earlier is None:
        return []
    wanted = _wants_overruling(earlier.table, earlier.is_overruled, kept_keys)
    return [key for key, wants in zip(earlier.table["key"].to_pylist(), wanted, strict=True) if wants]


def _wants_overruling(table: pa.Table, was_overruled: Sequence[bool], kept_keys: Collection[str]) -> list[bool]:
    rows = zip(table["key"].to_pylist(), table["status"].to_pylist(), was_overruled, strict=True)
    return [(was or status in RULES) and key in kept_keys for key, status, was in rows]


def stamps_path(target: Path) -> Path:
    return target.parent / STAMPS_FOLDER / target.name


def write_stamps(target: Path, today: Stamps, is_overruled: Sequence[bool], *, made_from: str) -> None:
    """Write the hidden part beside a manifest part that was made from the same. Same stamps, same bytes."""
    table = pa.table([pa.array(today.stamps, pa.binary(16)), pa.array(is_overruled, pa.bool_())], STAMPS)
    write_part(stamps_path(target), table, made_from=made_from, metadata={"pixels": today.pixels})


_MOVED = pa.schema([MANIFEST.field(name) for name in ("num_bytes", "sha256", *DECODED)])


@dataclass(frozen=True)
class MovedPixels:
    """What was made from the pixels of files that have vanished: perhaps they were only moved."""

    rows: pa.Table
    """Columns of _MOVED, sorted by num_bytes."""

    def of_size(self, num_bytes: int) -> tuple[Decoded, ...]:
        """Return what is known of vanished files of this size; which of them it is, if any, SHA-256 says."""
        sizes = np.asarray(self.rows["num_bytes"])
        first, last = np.searchsorted(sizes, num_bytes, "left"), np.searchsorted(sizes, num_bytes, "right")
        found = self.rows.slice(int(first), int(last - first)).select(["sha256", *DECODED]).to_pylist()
        return tuple(Decoded(row["sha256"], {name: row[name] for name in DECODED}) for row in found)


def vanished_pixels(parts: Iterable[Path], pixels: str) -> MovedPixels:
    """Collect what these manifest parts know of the pixels of vanished files, of parts with today's settings."""
    found: list[pa.Table] = []
    num_rows = 0
    for part, statuses in readable_parts(parts, ["status"]):
        is_vanished = pc.equal(statuses["status"], "vanished")
        if num_rows >= _MAX_MOVED or not pc.any(is_vanished).as_py():
            continue
        earlier = read_earlier(part, pixels)
        if earlier is not None and earlier.has_todays_pixels:
            rows = earlier.table.filter(is_vanished).select(_MOVED.names)
            found.append(rows.filter(pc.greater(pc.binary_length(rows["phash"]), 0)))
            num_rows += found[-1].num_rows
    return MovedPixels(pa.concat_tables([_MOVED.empty_table(), *found]).combine_chunks().sort_by("num_bytes"))


def readable_parts(parts: Iterable[Path], columns: Sequence[str]) -> Iterator[tuple[Path, pa.Table]]:
    """Yield parts with these columns, but for damaged ones: the task that owns such a part makes it again."""
    for part in parts:
        try:
            table = read_part(part, columns)
        except (FileNotFoundError, DamagedPartError):
            continue
        yield part, table


def vanished_row(earlier: Mapping[str, Any], row: Mapping[str, Any], *, keeps_pixels: bool) -> dict[str, Any]:
    """Return the row of a file that is gone: what was known of it, with today's status."""
    kept = {**earlier, "status": row["status"], "detail": row["detail"], "dataset": row["dataset"]}
    return kept if keeps_pixels else kept | dict.fromkeys(DECODED, b"")
