"""A chunk on disk: write its shards, commit it, read it back by byte offset.

    chunks/newest/0004/shard-00000-<digest>.tar …   ordinary webdataset tars
                       index-<digest>.parquet       one row per sample (schema.INDEX)
                       chunk.json                   names the files above; replacing it is the only commit

No chunk.json, no chunk. A combined chunk has an index only: its rows name shards of other chunks.
What goes into a chunk is decided elsewhere (`plan`, `pack`, `combine`).
"""

import contextlib
import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.files import TEMPORARY_MARK, replacing, sha256_file, temporary_name, write_json
from sharding.schema import INDEX, SCHEMA_VERSION
from sharding.tables import schema_mismatch

CHUNK_JSON = "chunk.json"
_SEAL = "trained-by-"
_DIGEST_LENGTH = 12
_TAR_BLOCK = 512
_TAR_RECORD = 10_240
_REMAKE = "delete it and run `python -m sharding pack` (`combine` for a combined chunk)"


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
class ChunkInfo:
    """What chunk.json says."""

    name: str
    """Folder relative to chunks/, for example `newest/0004`."""
    num_samples: int
    shards: tuple[ShardFile, ...]
    index: str
    """File name of the index."""
    index_sha256: str
    policy: str
    """Policy whose captions are in the index."""
    shard_policy: str
    """Policy whose captions are in the tars' KEY.txt; differs after `pack --captions-only`."""
    made_from: str
    """Digest of everything the chunk was made from."""
    seed: int
    is_combined: bool = False
    """Its samples stand in plain chunks, too; without real tars of its own its index points at theirs."""
    schema_version: int = SCHEMA_VERSION
    num_dropped: int = 0
    """Planned samples that turned out unusable when packing; each has a row in pack_drops."""
    shards_from: str = ""
    """Digest of what the tars were made from: keys in order and how pixels are written, but no caption."""
    shard_captions: str = ""
    """`captions_digest` of the KEY.txt in the tars; equal to the index's own when the tars are up to date."""

    @property
    def digest(self) -> str:
        """The chunk's identity for ledgers: changes with any sample, caption, order or pixel."""
        return hashlib.sha256(f"{self.name}\n{self.index_sha256}".encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One sample on its way into a shard. `image_name` is KEY.jpg or KEY.png; `row` completes the index row."""

    key: str
    image_name: str
    image: bytes
    facts: Mapping[str, Any]
    """KEY.json: flat, no null, no NaN."""
    caption: str
    row: Mapping[str, Any] = field(default_factory=dict)
    """Index columns this module cannot know: width, height, groups, dataset, period, repeats, loss_weight; `sha256`
    of the image bytes, if known, saves hashing them again."""
    mask: bytes = b""
    """KEY.mask.png, 8-bit grey of the image's size, or nothing."""


@dataclass(frozen=True)
class Chunk:
    """A committed chunk: its folder and what chunk.json says."""

    folder: Path
    info: ChunkInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def index_path(self) -> Path:
        return self.folder / self.info.index

    def read_index(self) -> pa.Table:
        """Read the index. Raises ChunkError when it is missing, damaged, of another schema or stale."""
        check_not_stale(self)
        return read_index(self.index_path, expected_sha256=self.info.index_sha256)

    def shard_path(self, shard: str) -> Path:
        """Return where a shard named in the index lies; combined chunks point out of their folder."""
        return Path(os.path.normpath(self.folder / PurePosixPath(shard)))


def read_index(path: Path, *, expected_sha256: str | None = None) -> pa.Table:
    """Read an index file, checked against its hash when one is given. Raises ChunkError."""
    try:
        if expected_sha256 is not None and (actual := sha256_file(path)) != expected_sha256:
            raise ChunkError(
                f"{path}: damaged: SHA-256 {actual[:12]}…, chunk.json says {expected_sha256[:12]}…; {_REMAKE}"
            )
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise ChunkError(f"{path}: the index is missing; run `python -m sharding pack`") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ChunkError(f"{path}: not a readable index ({error}); {_REMAKE}") from error
    if difference := schema_mismatch(table, INDEX):
        raise ChunkError(f"{path}: not an index of this version: {difference}")
    return table


def check_not_stale(chunk: Chunk) -> None:
    """Raise ChunkError if a combined chunk points at shards that are gone or have been replaced.

    A shard's name carries its digest, so one of the same name and size holds the samples that the index means.
    """
    if not chunk.info.is_combined:
        return
    gone = []
    for shard in chunk.info.shards:
        path = chunk.shard_path(shard.path)
        if shard.sha256[:_DIGEST_LENGTH] not in path.name or not _has_size(path, shard.num_bytes):
            gone.append(shard.path)
    if gone:
        raise ChunkError(
            f"chunk {chunk.name}: stale: {len(gone)} of {len(chunk.info.shards)} shards that it points at are gone, "
            f"first {gone[0]}; run `python -m sharding combine` again"
        )


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def chunk_name(dataset: str, number: int) -> str:
    """Return a chunk's name, which is its folder relative to chunks/: `newest/0004`."""
    return f"{dataset}/{number:04d}"


def name_of(folder: Path) -> str:
    """Return the name of the chunk in `folder`."""
    return f"{folder.parent.name}/{folder.name}"


def chunk_folders(root: Path) -> list[Path]:
    """Return the folders DATASET/0000 under `root` that hold a chunk.json, by name, without opening any."""
    return [path.parent for path in sorted(root.glob(f"*/*/{CHUNK_JSON}"))]


def damaged_files(chunk: Chunk) -> list[str]:
    """Return which of the index and the shards that chunk.json names are missing, or (shards) of another size.

    Cheap enough to ask of every chunk; damage that keeps the size is found by `verify`.
    """
    damaged = [
        shard.path for shard in chunk.info.shards if not _has_size(chunk.shard_path(shard.path), shard.num_bytes)
    ]
    return damaged if chunk.index_path.is_file() else [chunk.info.index, *damaged]


def captions_digest(keys: Iterable[str], captions: Iterable[str]) -> str:
    """Return the SHA-256 over keys and captions in order."""
    digest = hashlib.sha256()
    for key, caption in zip(keys, captions, strict=True):
        digest.update(f"{key}\0{caption}\n".encode())
    return digest.hexdigest()


def open_chunk(folder: Path) -> Chunk:
    """Open a committed chunk.

    Raises ChunkError when there is no chunk.json, when it cannot be understood, and when the chunk is stale.
    """
    chunk = load_chunk(folder)
    check_not_stale(chunk)
    return chunk


def load_chunk(folder: Path) -> Chunk:
    """Read chunk.json like `open_chunk`, but return a stale combined chunk, too: for listing and rebuilding."""
    path = folder / CHUNK_JSON
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [name_of(other) for other in chunk_folders(folder.parent.parent)]
        hint = f"there are {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else "pack it first"
        raise ChunkError(f"chunk {name_of(folder)}: no {CHUNK_JSON} in {folder}; {hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ChunkError(f"{path}: not valid JSON ({error}); {_REMAKE}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ChunkError(f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}; {_REMAKE}")
    try:
        shards = tuple(ShardFile(**shard) for shard in raw.pop("shards"))
        return Chunk(folder, ChunkInfo(shards=shards, **raw))
    except (TypeError, KeyError) as error:
        raise ChunkError(f"{path}: {error}; {_REMAKE}") from error


def list_chunks(root: Path) -> list[Chunk]:
    """Return the committed chunks under `root` (folders DATASET/0000), by name. A folder without chunk.json is none.

    Stale combined chunks are listed; reading their index is refused.
    """
    return [load_chunk(folder) for folder in chunk_folders(root)]


def write_shard(folder: Path, number: int, samples: Iterable[Sample]) -> tuple[ShardFile, list[dict[str, Any]]]:
    """Write one tar and return it with the index rows of its samples.

    The members of a sample are adjacent (json, image, txt by name), owners and times are fixed: same samples, same
    bytes. The file's name carries its digest, so a rewritten shard never hides behind an old name.
    Raises ChunkError for a key with a dot or a key that comes twice, ValueError for facts that are not strict JSON.
    """
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    placeholder = folder / f"shard-{number:05d}.tar"
    with contextlib.ExitStack() as stack:
        temporary = temporary_name(placeholder)
        folder.mkdir(parents=True, exist_ok=True)
        stack.callback(temporary.unlink, missing_ok=True)
        position = 0
        with temporary.open("wb") as stream:

            def add(name: str, data: bytes) -> int:
                nonlocal position
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.uname, info.gname = len(data), 0o444, "chunkline", "chunkline"
                for piece in (info.tobuf(tarfile.USTAR_FORMAT), data, b"\0" * (-len(data) % _TAR_BLOCK)):
                    stream.write(piece)
                    digest.update(piece)
                    position += len(piece)
                return position - len(data) - (-len(data) % _TAR_BLOCK)

            for sample in samples:
                if sample.key in seen or "." in sample.key or "/" in sample.key:
                    raise ChunkError(f"{placeholder}: key {sample.key!r} comes twice or holds a dot or slash")
                seen.add(sample.key)
                facts = json.dumps(dict(sample.facts), ensure_ascii=False, allow_nan=False).encode()
                text = sample.caption.encode()
                members = {sample.image_name: sample.image, f"{sample.key}.json": facts, f"{sample.key}.txt": text}
                mask_name = f"{sample.key}.mask.png"
                if sample.mask:
                    members[mask_name] = sample.mask
                offsets = {name: add(name, members[name]) for name in sorted(members)}
                rows.append(
                    {
                        "key": sample.key,
                        "image_name": sample.image_name,
                        "image_offset": offsets[sample.image_name],
                        "image_bytes": len(sample.image),
                        "json_offset": offsets[f"{sample.key}.json"],
                        "json_bytes": len(facts),
                        "txt_offset": offsets[f"{sample.key}.txt"],
                        "txt_bytes": len(text),
                        "mask_offset": offsets.get(mask_name, 0),
                        "mask_bytes": len(sample.mask),
                        "caption": sample.caption,
                        **sample.row,
                        "sha256": sample.row.get("sha256") or hashlib.sha256(sample.image).hexdigest(),
                    }
                )
            end = b"\0" * (2 * _TAR_BLOCK + -(position + 2 * _TAR_BLOCK) % _TAR_RECORD)
            stream.write(end)
            digest.update(end)
            stream.flush()
            os.fsync(stream.fileno())
        sha256 = digest.hexdigest()
        path = folder / f"shard-{number:05d}-{sha256[:_DIGEST_LENGTH]}.tar"
        os.replace(temporary, path)
    shard = ShardFile(path=path.name, sha256=sha256, num_bytes=position + len(end), num_samples=len(rows))
    for row in rows:
        row["shard"], row["shard_sha256"] = shard.path, sha256
    return shard, rows


def commit_chunk(
    folder: Path,
    rows: pa.Table | Iterable[Mapping[str, Any]],
    *,
    name: str,
    shards: Iterable[ShardFile],
    policy: str,
    shard_policy: str,
    made_from: str,
    seed: int,
    is_combined: bool = False,
    num_dropped: int = 0,
    shards_from: str = "",
    shard_captions: str = "",
) -> Chunk:
    """Write the index under a name with its digest, then replace chunk.json: from then on this is the chunk.

    rows: complete index rows in training order (schema.INDEX); a key may stand only once (ChunkError).
    Files that only the previous chunk.json named are left for `remove_unnamed`.
    """
    if not isinstance(rows, pa.Table):
        rows = pa.Table.from_pylist([dict(row) for row in rows], schema=INDEX)
    table = rows.select(INDEX.names).cast(INDEX).replace_schema_metadata(None).combine_chunks()
    keys = table.column("key").to_pylist()
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ChunkError(f"chunk {name}: key {twice} stands twice")
    placeholder = folder / "index.parquet"
    with replacing(placeholder) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    sha256 = sha256_file(placeholder)
    index = f"index-{sha256[:_DIGEST_LENGTH]}.parquet"
    os.replace(placeholder, folder / index)
    info = ChunkInfo(
        name=name,
        num_samples=len(keys),
        shards=tuple(shards),
        index=index,
        index_sha256=sha256,
        policy=policy,
        shard_policy=shard_policy,
        made_from=made_from,
        seed=seed,
        is_combined=is_combined,
        num_dropped=num_dropped,
        shards_from=shards_from,
        shard_captions=shard_captions,
    )
    write_json(folder / CHUNK_JSON, asdict(info))
    return Chunk(folder, info)


def seal(chunk: Chunk, run_id: str) -> None:
    """Mark a chunk, and the chunks that a combined one points into, as trained by a run: planning leaves them alone.

    A read-only workspace cannot be replanned either, so failing to write there is not an error.
    """
    shard_folders = {chunk.shard_path(shard.path).parent for shard in chunk.info.shards}
    for folder in sorted({chunk.folder, *shard_folders}):
        try:
            (folder / f"{_SEAL}{run_id}").touch()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise


def is_sealed(folder: Path) -> bool:
    """Tell whether a run has started to train the chunk in `folder`."""
    return any(folder.glob(f"{_SEAL}*"))


def remove_unnamed(chunk: Chunk) -> list[Path]:
    """Delete files in the chunk's folder that its chunk.json does not name (left by killed or earlier packs).

    Seals and hidden files stay. Only the owner of the folder may call this, and not while a run may read old shards.
    """
    named = {CHUNK_JSON, chunk.info.index, *(shard.path for shard in chunk.info.shards)}
    unnamed = [
        path
        for path in sorted(chunk.folder.iterdir())
        if path.is_file()
        and path.name not in named
        and (TEMPORARY_MARK in path.name or not path.name.startswith((_SEAL, ".")))
    ]
    for path in unnamed:
        path.unlink()
    return unnamed


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


def iterate_samples(chunk: Chunk) -> Iterator[tuple[str, bytes, dict[str, Any], str]]:
    """Yield (key, image bytes, facts, caption of the tar) of every sample in index order, read by offset."""
    yield from iterate_rows(chunk.folder, chunk.read_index())


def iterate_rows(folder: Path, rows: pa.Table) -> Iterator[tuple[str, bytes, dict[str, Any], str]]:
    """Yield what `iterate_samples` does for some index rows; `folder` is what their shards are relative to."""
    reader = ShardReader()
    try:
        for row in rows.to_pylist():
            path = Path(os.path.normpath(folder / PurePosixPath(row["shard"])))
            image = reader.read(path, row["image_offset"], row["image_bytes"])
            facts = json.loads(reader.read(path, row["json_offset"], row["json_bytes"]))
            text = reader.read(path, row["txt_offset"], row["txt_bytes"]).decode()
            yield row["key"], image, facts, text
    finally:
        reader.close()
