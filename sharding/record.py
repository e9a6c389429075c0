"""One file → its record: read once, hashed, judged by the filters, decoded once.

Pure but for reading the file and its sidecars; runs in worker processes. A file never makes it raise: what is wrong
with it becomes `status` and `detail`. The order: readable, header, filters on header, metadata, filters on metadata,
decode.
"""

import hashlib
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.config import DedupeConfig, FilterConfig
from sharding.images import ImageError, ImageFacts, decode_rgb, probe
from sharding.metadata import IMPORTERS, Metadata, date_in_path
from sharding.phash import enough_pixels, hash_picture
from sharding.schema import MANIFEST, TAG_CATEGORIES

BROKEN = ("undecodable", "not_an_image", "empty_file", "unreadable")
"""Statuses that count towards `max_broken_fraction`."""

_EMPTY_ROW: dict[str, Any] = {
    "key": "", "sha256": "", "format": "", "width": 0, "height": 0, "mode": "", "has_alpha": False,
    "is_animated": False, "is_pass_through": False, "created_at": None, "date_source": "", "phash": b"",
    "turned_phashes": b"", "sketch": b"", "local_features": b"", "rating": "",
    **{f"tags_{category}": [] for category in TAG_CATEGORIES}, "custom": [],
}  # fmt: skip


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
        data = _read(task.root / task.path)
        sha256 = hashlib.sha256(data).hexdigest()
        row |= {"sha256": sha256, "key": sha256[:16], "num_bytes": len(data)}
        if not decode:
            raise _DropError("undecodable", "the decoder crashed on this file")
        facts = _judge_header(data, row, rules.filters)
        metadata = IMPORTERS[task.importer](task.root, PurePosixPath(task.path))
        _add_metadata(row, metadata, facts, task.path)
        _judge_metadata(row, metadata, rules.filters)
        row["phash"] = _hash_pixels(data, rules)
        row |= {"status": "kept", "detail": metadata.problem}
    except (_DropError, ImageError) as drop:
        row |= {"status": drop.reason, "detail": drop.detail}
    return {name: row[name] for name in MANIFEST.names}


def _read(path: Path) -> bytes:
    """Return the file's bytes, read again once if it changes meanwhile."""
    for _ in range(2):
        try:
            with path.open("rb") as stream:
                data = stream.read()
                after = os.fstat(stream.fileno())
        except (FileNotFoundError, NotADirectoryError):
            raise _DropError("vanished", "listed, but no longer there") from None
        except OSError as error:
            raise _DropError("unreadable", f"{error.strerror or error}") from error
        if after.st_size == len(data):
            return data
    raise _DropError("unreadable", f"changes while it is read: {len(data):,} bytes read, {after.st_size:,} expected")


def _judge_header(data: bytes, row: dict[str, Any], filters: FilterConfig) -> ImageFacts:
    if data and len(data) < filters.min_bytes:
        raise _DropError("too_few_bytes", f"{len(data):,} bytes, at least {filters.min_bytes:,} wanted")
    facts = probe(data, max_pixels=filters.max_pixels)
    names = ("format", "width", "height", "mode", "has_alpha", "is_animated", "is_pass_through")
    row |= {name: getattr(facts, name) for name in names}
    if facts.is_animated and filters.animated == "drop":
        raise _DropError("animated", f"an animated {facts.format}")
    width, height = facts.width, facts.height
    if width * height < filters.min_pixels:
        raise _DropError(
            "too_small", f"{width}x{height} = {width * height:,} pixels, at least {filters.min_pixels:,} wanted"
        )
    aspect = max(width, height) / min(width, height)
    if aspect > filters.max_aspect:
        raise _DropError("extreme_aspect", f"{width}x{height} is {aspect:.2f}:1, at most {filters.max_aspect:g}:1")
    return facts


def _add_metadata(row: dict[str, Any], metadata: Metadata, facts: ImageFacts, path: str) -> None:
    for category, tags in metadata.tags.items():
        row[f"tags_{category}"] = list(tags)
    row |= {"rating": metadata.rating, "custom": sorted(metadata.custom.items())}
    dates: list[tuple[str, datetime | None]] = [
        (metadata.date_source, metadata.created_at),
        ("exif", facts.exif_date),
        ("path", date_in_path(PurePosixPath(path))),
    ]
    row["date_source"], row["created_at"] = next(((name, date) for name, date in dates if date), ("", None))
    if row["created_at"] is not None:
        row["created_at"] = row["created_at"].replace(microsecond=0)


def _judge_metadata(row: dict[str, Any], metadata: Metadata, filters: FilterConfig) -> None:
    for flag in filters.drop_flags:
        if flag in metadata.flags:
            raise _DropError(flag, "set in the post")
    unwanted = set(filters.tag_blacklist)
    for category, tags in metadata.tags.items():
        if found := [tag for tag in tags if tag in unwanted]:
            raise _DropError("blacklisted_tag", f"{category} tag {', '.join(found)}")
    if filters.ratings and row["rating"] and row["rating"] not in filters.ratings:
        raise _DropError("rating_not_wanted", f"{row['rating']}; wanted: {', '.join(filters.ratings)}")


def _hash_pixels(data: bytes, rules: Rules) -> bytes:
    hash_size = rules.dedupe.hash_size
    image = decode_rgb(data, min_side=enough_pixels(hash_size), max_pixels=rules.filters.max_pixels)
    return hash_picture(image, algorithm=rules.dedupe.algorithm, hash_size=hash_size)
