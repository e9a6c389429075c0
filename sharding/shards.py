"""A shard on disk: an ordinary webdataset tar that is written once and read by byte offset.

Knows members and offsets; which shards make up a chunk is `chunk`'s, which samples go into one `plan`'s.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa

from sharding.files import naming_full_disk, temporary_name

DIGEST_LENGTH = 12
"""Digits of a file's SHA-256 that stand in its name."""
_TAR_BLOCK = 512
_TAR_RECORD = 10_240
_NAME_BYTES = 99
_MOST_OCTAL = 8**11 - 1
_PLACES = ("image", "json", "txt", "mask")


class ChunkError(ValueError):
    """A chunk is missing, incomplete, stale or damaged."""


@dataclass(frozen=True)
class ShardFile:
    """One tar as chunk.json names it. path: relative to the chunk's folder, "/" separated."""

    path: str
    sha256: str
    num_bytes: int
    num_samples: int


@dataclass(frozen=True)
class Sample:
    """One sample on its way into or out of a shard. `row` completes the index row; read back, it is the whole row."""

    key: str
    image_name: str
    """KEY.jpg or KEY.png; other endings only when `pack.pass_through_formats` allows them."""
    image: bytes
    facts: Mapping[str, Any]
    """KEY.json: flat, no null, no NaN."""
    caption: str
    """KEY.txt."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Index columns this module cannot know: width, height, groups, dataset, period, repeats, loss_weight; `sha256`
    of the image bytes, if known, saves hashing them again."""
    mask: bytes = b""
    """KEY.mask.png, 8-bit grey of the image's size, or nothing."""


def mask_name(key: str) -> str:
    """Return the member name of a sample's mask; webdataset calls its field `mask.png`."""
    return f"{key}.mask.png"


def member_names(row: Mapping[str, Any]) -> dict[str, str]:
    """Return prefix of the index columns → member name, for each member that a sample has: image, json, txt, mask."""
    key = row["key"]
    names = {"image": row["image_name"], "json": f"{key}.json", "txt": f"{key}.txt"}
    return names | ({"mask": mask_name(key)} if row["mask_bytes"] else {})


def write_shard(folder: Path, number: int, samples: Iterable[Sample]) -> tuple[ShardFile, list[dict[str, Any]]]:
    """Write one tar and return it with the index rows of its samples.

    The members of a sample are adjacent (by name), owners and times are fixed: same samples, same bytes. The file's
    name carries its digest, so a rewritten shard never hides behind an old name.
    Raises ChunkError for a key with a dot or a key that comes twice, ValueError for facts that are not strict JSON,
    DiskFullError.
    """
    placeholder = folder / f"shard-{number:05d}.tar"
    temporary = temporary_name(placeholder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    try:
        with naming_full_disk(placeholder), temporary.open("wb") as stream:
            tar = _TarStream(stream)
            for sample in samples:
                if sample.key in seen or "." in sample.key or "/" in sample.key:
                    raise ChunkError(f"{placeholder}: key {sample.key!r} comes twice or holds a dot or slash")
                seen.add(sample.key)
                rows.append(_add_sample(tar, sample))
            sha256, num_bytes = tar.finish()
            stream.flush()
            os.fsync(stream.fileno())
        path = folder / f"shard-{number:05d}-{sha256[:DIGEST_LENGTH]}.tar"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    shard = ShardFile(path=path.name, sha256=sha256, num_bytes=num_bytes, num_samples=len(rows))
    for row in rows:
        row["shard"], row["shard_sha256"] = shard.path, sha256
    return shard, rows


def _add_sample(tar: "_TarStream", sample: Sample) -> dict[str, Any]:
    members: dict[str, bytes] = {
        sample.image_name: sample.image,
        f"{sample.key}.json": json.dumps(dict(sample.facts), ensure_ascii=False, allow_nan=False).encode(),
        f"{sample.key}.txt": sample.caption.encode(),
    }
    if sample.mask:
        members[mask_name(sample.key)] = sample.mask
    offsets = {name: tar.add(name, members[name]) for name in sorted(members)}
    row = {
        "caption": sample.caption,
        **sample.row,
        "key": sample.key,
        "image_name": sample.image_name,
        "mask_offset": 0,
        "mask_bytes": len(sample.mask),
        "sha256": sample.row.get("sha256") or hashlib.sha256(sample.image).hexdigest(),
    }
    for place, name in member_names(row).items():
        row[f"{place}_offset"], row[f"{place}_bytes"] = offsets[name], len(members[name])
    return row


class _TarStream:
    """Writes tar members and hashes what it writes. Each byte of a picture is hashed and copied once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._position = 0
        self._padding = b""

    def add(self, name: str, data: bytes) -> int:
        """Write a member and return the offset of its bytes."""
        self._write(self._padding + _header(name, len(data)))
        offset = self._position
        self._write(data)
        self._padding = b"\0" * (-len(data) % _TAR_BLOCK)
        return offset

    def finish(self) -> tuple[str, int]:
        """Write the end of the tar; return SHA-256 and size of the file."""
        end = self._position + len(self._padding) + 2 * _TAR_BLOCK
        self._write(self._padding + b"\0" * (2 * _TAR_BLOCK + -end % _TAR_RECORD))
        return self._digest.hexdigest(), self._position

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._position += len(data)


def _header(name: str, num_bytes: int) -> bytes:
    """Return a member's USTAR header, with fixed owner and time.

    Three numbers are put into a header that `tarfile` has made: letting it make each takes as long as hashing 60 kB.
    """
    field = name.encode()
    if len(field) > _NAME_BYTES or num_bytes > _MOST_OCTAL:
        return _made_header(name, num_bytes)
    header = bytearray(_PLAIN_HEADER)
    header[: len(field)] = field
    header[124:135] = b"%011o" % num_bytes
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _made_header(name: str, num_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = num_bytes, 0o444, "chunkline", "chunkline"
    return info.tobuf(tarfile.USTAR_FORMAT)


_PLAIN_HEADER = _made_header("", 0)


class ShardReader:
    """Read bytes out of shards by offset; keeps files open. One per worker: not safe to share between processes.

    Reads do not move a file position, so threads may share one.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` bytes at `offset`. Raises ChunkError when the file is missing or too short."""
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except FileNotFoundError:
                raise ChunkError(f"{path}: the shard is missing; run `python -m sharding verify`") from None
            self._descriptors[path] = descriptor
        data = _read_at(descriptor, num_bytes, offset)
        if len(data) != num_bytes:
            raise ChunkError(f"{path}: ends at byte {offset + len(data):,}, {offset + num_bytes:,} are needed; damaged")
        return data

    def read_member(self, folder: Path, row: Mapping[str, Any], place: str) -> bytes:
        """Return a member of a sample: place is image, json, txt or mask (b"" when there is none).

        row: of the index of the chunk in `folder`.
        """
        if not row[f"{place}_bytes"]:
            return b""
        return self.read(shard_path(folder, row["shard"]), row[f"{place}_offset"], row[f"{place}_bytes"])

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _read_at(descriptor: int, num_bytes: int, offset: int) -> bytes:
    if not hasattr(os, "pread"):  # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, num_bytes)
    parts = []
    while num_bytes > 0 and (part := os.pread(descriptor, num_bytes, offset)):
        parts.append(part)
        offset += len(part)
        num_bytes -= len(part)
    return b"".join(parts)


def shard_path(folder: Path, shard: str) -> Path:
    """Return where a shard named in an index lies; `folder` is the chunk's, and combined chunks point out of it."""
    return Path(os.path.normpath(folder / PurePosixPath(shard)))


def read_samples(folder: Path, rows: pa.Table) -> Iterator[Sample]:
    """Yield the samples of some index rows in order, with masks; `folder` is what their shards are relative to."""
    reader = ShardReader()
    try:
        for row in rows.to_pylist():
            image, facts, text, mask = (reader.read_member(folder, row, place) for place in _PLACES)
            yield Sample(row["key"], row["image_name"], image, json.loads(facts), text.decode(), row, mask)
    finally:
        reader.close()
