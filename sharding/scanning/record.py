"""One file → its record: read once, hashed, judged by the filters, decoded once.

Pure but for reading the file and its sidecars; runs in worker processes. A file never makes it raise: what is wrong
with it becomes `status` and `detail`. The order: readable, metadata, filters on the file, header, filters on header
and metadata, decode. Pixels that were decoded before, from the same bytes, are not decoded again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.config import DedupeConfig, FilterConfig
from sharding.images import ImageError, decode_grey, decode_rgb, probe
from sharding.metadata import IMPORTERS, NO_TABLES, Metadata, Tables, date_in_path
from sharding.pictures.local_features import FEATURES_VERSION, MIN_SIDE, extract_features
from sharding.pictures.phash import HASH_VERSION, enough_pixels, hash_picture, hash_turned
from sharding.pictures.sketch import SKETCH_VERSION, make_sketch
from sharding.scanning.filters import Objection, objection_to_file, objection_to_picture, objection_to_post
from sharding.schema import MANIFEST, TAG_CATEGORIES
from sharding.sources import read_file

DECODED = ("phash", "turned_phashes", "sketch", "local_features")
"""Columns that come from pixels; they depend on the bytes of the file and on the dedupe settings only."""
BROKEN = ("undecodable", "not_an_image", "empty_file", "unreadable")
"""Statuses that count towards `max_broken_fraction`."""

_HEADER_FACTS = ("format", "width", "height", "mode", "has_alpha", "is_animated", "is_pass_through")
_EMPTY_ROW: dict[str, Any] = {
    "key": "", "sha256": "", "format": "", "width": 0, "height": 0, "mode": "", "has_alpha": False,
    "is_animated": False, "is_pass_through": False, "created_at": None, "date_source": "", "phash": b"",
    "turned_phashes": b"", "sketch": b"", "local_features": b"", "rating": "",
    **{f"tags_{category}": [] for category in TAG_CATEGORIES}, "custom": [],
}  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """What an earlier scan has made, with today's settings, from the pixels of a file. columns: DECODED."""

    sha256: str
    columns: Mapping[str, bytes]


@dataclass(frozen=True)
class FileTask:
    """A file of the listing and how its source is read."""

    source: str
    dataset: str
    importer: str
    root: Path
    path: str
    num_bytes: int
    """As listed; the manifest has what was read."""
    tables: Tables = NO_TABLES
    date_pattern: str = ""
    is_overruled: bool = False
    """A person keeps this file: the filters are not asked."""
    decoded: tuple[Decoded, ...] = ()
    """Of files that this one may be."""


@dataclass(frozen=True)
class Rules:
    """What decides about files and hashes."""

    filters: FilterConfig
    dedupe: DedupeConfig


class _DropError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def make_record(task: FileTask, rules: Rules, *, decode: bool = True) -> dict[str, Any]:
    """Return the manifest row (schema.MANIFEST) of one file.

    decode=False stops before the decoder, for a file that has killed it: its status is then `undecodable`.
    """
    row: dict[str, Any] = {
        **_EMPTY_ROW, "source": task.source, "dataset": task.dataset, "path": task.path, "num_bytes": task.num_bytes,
    }  # fmt: skip
    try:
        data = _read(task)
        sha256 = hashlib.sha256(data).hexdigest()
        row |= {"sha256": sha256, "key": sha256[:16], "num_bytes": len(data)}
        if not decode:
            raise _DropError("undecodable", "the decoder crashed on this file")
        metadata = IMPORTERS[task.importer](task.root, PurePosixPath(task.path), task.tables)
        row |= _metadata_columns(metadata)
        filters = None if task.is_overruled else rules.filters
        if filters is not None:
            _drop_for(objection_to_file(task.path, len(data), metadata, filters))
        facts = probe(data, max_pixels=rules.filters.max_pixels)
        row |= {name: getattr(facts, name) for name in _HEADER_FACTS}
        row |= _date_columns(metadata, facts.exif_date, task)
        if filters is not None:
            _drop_for(objection_to_picture(facts, len(data), metadata, filters))
            _drop_for(objection_to_post(metadata, filters))
        if found := [decoded for decoded in task.decoded if decoded.sha256 == sha256]:
            row |= found[0].columns
        else:
            row |= _decoded_columns(data, rules)
        row |= {"status": "kept", "detail": metadata.problem}
    except (_DropError, ImageError) as drop:
        row |= {"status": drop.reason, "detail": drop.detail}
    return {name: row[name] for name in MANIFEST.names}


def _read(task: FileTask) -> bytes:
    try:
        return read_file(task.root, task.path)
    except (FileNotFoundError, NotADirectoryError):
        raise _DropError("vanished", "listed, but no longer there") from None
    except OSError as error:
        raise _DropError("unreadable", f"{error.strerror or error}") from error


def _drop_for(objection: Objection | None) -> None:
    if objection is not None:
        raise _DropError(objection.reason, objection.detail)


def _metadata_columns(metadata: Metadata) -> dict[str, Any]:
    tags = {f"tags_{category}": list(tags) for category, tags in metadata.tags.items()}
    return {**tags, "rating": metadata.rating, "custom": sorted(metadata.custom.items())}


def _date_columns(metadata: Metadata, exif_date: datetime | None, task: FileTask) -> dict[str, Any]:
    """Return the first date of post, EXIF and path, in whole seconds, and which it is."""
    dates = [
        (metadata.date_source, metadata.created_at),
        ("exif", exif_date),
        ("path", date_in_path(PurePosixPath(task.path), task.date_pattern)),
    ]
    source, date = next(((name, date) for name, date in dates if date), ("", None))
    return {"date_source": source, "created_at": date.replace(microsecond=0) if date else None}


def pixel_settings(dedupe: DedupeConfig) -> list[Any]:
    """Return all settings that the columns DECODED depend on: another value decodes every picture again."""
    second_look = [SKETCH_VERSION * dedupe.keep_variants, FEATURES_VERSION * dedupe.find_crops]
    return [HASH_VERSION, dedupe.algorithm, dedupe.hash_size, list(dedupe.turns), second_look]


def _decoded_columns(data: bytes, rules: Rules) -> dict[str, bytes]:
    """Decode once and return the columns DECODED."""
    dedupe = rules.dedupe
    algorithm, hash_size = dedupe.algorithm, dedupe.hash_size
    needs_colour = algorithm == "colorhash" or dedupe.keep_variants or dedupe.find_crops
    decode = decode_rgb if needs_colour else decode_grey
    min_side = max(enough_pixels(hash_size), MIN_SIDE * (dedupe.keep_variants or dedupe.find_crops))
    image = decode(data, min_side=min_side, max_pixels=rules.filters.max_pixels)
    return {
        "phash": hash_picture(image, algorithm=algorithm, hash_size=hash_size),
        "turned_phashes": hash_turned(image, dedupe.turns, algorithm=algorithm, hash_size=hash_size),
        "sketch": make_sketch(image) if dedupe.keep_variants else b"",
        "local_features": extract_features(image) if dedupe.find_crops else b"",
    }
