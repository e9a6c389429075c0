"""A chunk on disk: commit it, find it, open it, read it.

    chunks/newest/0004/shard-00000-<digest>.tar …   ordinary webdataset tars (`shards`)
                       index-<digest>.parquet       one row per sample (schema.INDEX)
                       chunk.json                   names the files above; replacing it is the only commit
    chunks/newest/held-out/                         the same, but set aside for validation

No chunk.json, no chunk. A combined chunk has an index only: its rows name shards of other chunks.
What goes into a chunk is decided elsewhere (`plan`, `pack`, `combine`). All that other packages need of shards is
importable from here.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.files import TEMPORARY_MARK, replacing, sha256_file, write_json
from sharding.schema import HELD_OUT, INDEX, SCHEMA_VERSION, index_schema
from sharding.shards import (
    DIGEST_LENGTH,
    ChunkError,
    Sample,
    ShardFile,
    ShardReader,
    read_samples,
    shard_path,
    write_shard,
)
from sharding.tables import schema_mismatch

__all__ = [
    "CHUNK_JSON",
    "HELD_OUT_NAME",
    "SHARDS_ELSEWHERE",
    "Chunk",
    "ChunkError",
    "ChunkInfo",
    "Sample",
    "ShardFile",
    "ShardReader",
    "captions_digest",
    "check_not_stale",
    "chunk_folders",
    "chunk_name",
    "chunk_number",
    "commit_chunk",
    "damaged_files",
    "is_sealed",
    "iterate_samples",
    "list_chunks",
    "load_chunk",
    "name_of",
    "open_chunk",
    "read_index",
    "read_samples",
    "remove_unnamed",
    "seal",
    "shard_path",
    "write_shard",
]

CHUNK_JSON = "chunk.json"
HELD_OUT_NAME = "held-out"
"""Folder of a dataset's validation chunk."""
SHARDS_ELSEWHERE = ".shards-elsewhere"
"""File in the folder of a chunk that mirrors one on another machine: its shards are brought when they are needed."""
_SEAL = "trained-by-"
_REMAKE = "delete it and run `python -m sharding pack` (`combine` for a combined chunk)"


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
    is_held_out: bool = False
    """Set aside for validation: no run trains it, no wave mixes it."""
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
        return shard_path(self.folder, shard)


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
    if difference := schema_mismatch(table, index_schema(table.column_names)):
        raise ChunkError(f"{path}: not an index of this version: {difference}")
    return table


def check_not_stale(chunk: Chunk) -> None:
    """Raise ChunkError if a combined chunk points at shards that are gone or have been replaced.

    A shard's name carries its digest, so one of the same name and size holds the samples that the index means. The
    shards of a mirrored chunk may be elsewhere: who reads them looks himself.
    """
    if not chunk.info.is_combined or (chunk.folder / SHARDS_ELSEWHERE).exists():
        return
    gone = []
    for shard in chunk.info.shards:
        path = chunk.shard_path(shard.path)
        if shard.sha256[:DIGEST_LENGTH] not in path.name or not _has_size(path, shard.num_bytes):
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
    """Return a chunk's name, which is its folder relative to chunks/: `newest/0004`, or `newest/held-out`."""
    return f"{dataset}/{HELD_OUT_NAME if number == HELD_OUT else f'{number:04d}'}"


def chunk_number(folder: Path) -> int | None:
    """Return the number of the chunk in `folder` (HELD_OUT for a validation chunk); None for combined chunks."""
    if folder.name == HELD_OUT_NAME:
        return HELD_OUT
    return int(folder.name) if folder.name.isdigit() else None


def name_of(folder: Path) -> str:
    """Return the name of the chunk in `folder`."""
    return f"{folder.parent.name}/{folder.name}"


def chunk_folders(root: Path) -> list[Path]:
    """Return the folders DATASET/0000 and DATASET/held-out under `root` that hold a chunk.json, without opening any."""
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


def list_chunks(root: Path, *, with_held_out: bool = False) -> list[Chunk]:
    """Return the committed chunks under `root` that may be trained, by name. A folder without chunk.json is none.

    with_held_out: those set aside for validation, too. Stale combined chunks are listed; reading their index is
    refused.
    """
    chunks = [load_chunk(folder) for folder in chunk_folders(root)]
    return [chunk for chunk in chunks if with_held_out or not chunk.info.is_held_out]


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
    is_held_out: bool = False,
    num_dropped: int = 0,
    shards_from: str = "",
    shard_captions: str = "",
) -> Chunk:
    """Write the index under a name with its digest, then replace chunk.json: from then on this is the chunk.

    rows: complete index rows in training order (schema.INDEX; a table may have columns of OF_CONCEPTS, too); a key may
    stand only once (ChunkError).
    Files that only the previous chunk.json named are left for `remove_unnamed`.
    """
    if not isinstance(rows, pa.Table):
        rows = pa.Table.from_pylist([dict(row) for row in rows], schema=INDEX)
    schema = index_schema(rows.column_names)
    table = rows.select(schema.names).cast(schema).replace_schema_metadata(None).combine_chunks()
    keys = table.column("key").to_pylist()
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ChunkError(f"chunk {name}: key {twice} stands twice")
    placeholder = folder / "index.parquet"
    with replacing(placeholder) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    sha256 = sha256_file(placeholder)
    index = f"index-{sha256[:DIGEST_LENGTH]}.parquet"
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
        is_held_out=is_held_out,
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
        path.unlink(missing_ok=True)
    return unnamed


def iterate_samples(chunk: Chunk) -> Iterator[tuple[str, bytes, dict[str, Any], str]]:
    """Yield (key, image bytes, facts, caption of the tar) of every sample in index order, read by offset.

    `read_samples(chunk.folder, chunk.read_index())` gives the same with masks and index rows.
    """
    for sample in read_samples(chunk.folder, chunk.read_index()):
        yield sample.key, sample.image, dict(sample.facts), sample.caption
