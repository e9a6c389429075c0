"""Chunks of concepts on disk: what is there, what has to be written anew, and what is no stage's any more.

A chunk is written whole: its tars under names with their digests, then its index, then chunk.json, which is the only
commit. What a run has started keeps its tars. What a sample holds is in `samples`, the format is `sharding.chunk`'s.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from sharding.chunk import (
    CHUNK_JSON,
    HELD_OUT_NAME,
    Chunk,
    ChunkError,
    captions_digest,
    chunk_folders,
    commit_chunk,
    damaged_files,
    is_sealed,
    load_chunk,
    name_of,
    remove_unnamed,
    write_shard,
)
from sharding.files import digest_of, locked, require_free_bytes
from sharding.schema import OF_CONCEPTS, Workspace, index_schema
from training.dreambooth.packing.rows import Row
from training.dreambooth.packing.samples import JPEG_QUALITY, sample_of
from training.stages import CONCEPTS

POLICY = "concepts"
"""What chunk.json says of chunks that were packed here."""
HELD_OUT = f"{CONCEPTS}/{HELD_OUT_NAME}"
_SHARD_SIZE = 1_000
_FORMAT = 1
"""Counted up when the same rows are written otherwise: all chunks are then packed again."""
_BYTES_PER_MEMBERS = 6_000


@dataclass(frozen=True)
class Wanted:
    """A chunk that there should be."""

    name: str
    rows: tuple[Row, ...]
    shares_samples: bool
    """Some of its samples are in an earlier chunk, too."""

    @property
    def is_held_out(self) -> bool:
        return self.name == HELD_OUT

    @property
    def made_from(self) -> str:
        """Digest of all that it holds: no place of a file, no time."""
        facts = [
            [row.label, row.picture.sha256, row.picture.path, row.text, row.loss_weight, asdict(row.turn)]
            for row in self.rows
        ]
        return digest_of([_FORMAT, JPEG_QUALITY, self.shares_samples, facts])


@contextmanager
def own_chunks(workspace: Workspace, *, dry_run: bool) -> Iterator[dict[str, Chunk]]:
    """Yield the packed concepts of a workspace by chunk name; no other process packs there meanwhile."""
    with locked(workspace.chunks / CONCEPTS, dry_run=dry_run):
        folders = [folder for folder in chunk_folders(workspace.chunks) if folder.parent.name == CONCEPTS]
        chunks = {name_of(folder): load_chunk(folder) for folder in folders}
        yield {name: chunk for name, chunk in chunks.items() if chunk.info.policy == POLICY}


def known_keys(chunks: Mapping[str, Chunk]) -> dict[str, None]:
    """Return the keys in whole chunks: their pictures were decoded when they were packed."""
    whole = [chunk for chunk in chunks.values() if _is_whole(chunk)]
    return dict.fromkeys(key for chunk in whole for key in chunk.read_index().column("key").to_pylist())


def is_current(chunk: Chunk | None, wanted: Wanted) -> bool:
    """Tell whether a chunk is what is wanted, with all of its files."""
    return chunk is not None and chunk.info.made_from == wanted.made_from and _is_whole(chunk)


def _is_whole(chunk: Chunk) -> bool:
    """Tell whether all files are there, shards by their size."""
    if damaged_files(chunk):
        return False
    try:
        chunk.read_index()
    except ChunkError:
        return False
    return True


def write_chunk(workspace: Workspace, wanted: Wanted, *, seed: int) -> Chunk:
    """Write a chunk in place of the one of its name.

    Raises ChunkError when that one was not packed here, BrokenDataError when a picture has changed meanwhile,
    DiskFullError before the first byte when it does not fit.
    """
    folder = workspace.chunks / wanted.name
    if (folder / CHUNK_JSON).exists() and load_chunk(folder).info.policy != POLICY:
        raise ChunkError(f"chunk {wanted.name}: {folder} was not made of concepts; take another data.workspace")
    num_bytes = sum(row.picture.num_bytes + _BYTES_PER_MEMBERS for row in wanted.rows)
    require_free_bytes(folder, num_bytes, "packing concepts")
    shards, written = [], []
    for number, start in enumerate(range(0, len(wanted.rows), _SHARD_SIZE)):
        shard, index_rows = write_shard(folder, number, map(sample_of, wanted.rows[start : start + _SHARD_SIZE]))
        shards.append(shard)
        written += index_rows
    index = _index(written, wanted.rows)
    chunk = commit_chunk(
        folder,
        index,
        name=wanted.name,
        shards=shards,
        policy=POLICY,
        shard_policy=POLICY,
        made_from=wanted.made_from,
        seed=seed,
        is_combined=wanted.shares_samples,
        is_held_out=wanted.is_held_out,
        shards_from=wanted.made_from,
        shard_captions=captions_digest(index.column("key").to_pylist(), index.column("caption").to_pylist()),
    )
    if not is_sealed(folder):
        remove_unnamed(chunk)
    return chunk


def remove_chunk(chunk: Chunk) -> None:
    """Take a chunk away. What a run has started is only not listed any more; its tars stay for that run."""
    (chunk.folder / CHUNK_JSON).unlink()
    if not is_sealed(chunk.folder):
        shutil.rmtree(chunk.folder)


def _index(written: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> pa.Table:
    of_concepts = (
        {"concept": row.label, "every_epochs": row.turn.every, "epoch_offset": row.turn.offset} for row in rows
    )
    whole = [{**one, **more} for one, more in zip(written, of_concepts, strict=True)]
    return pa.Table.from_pylist(whole, schema=index_schema(OF_CONCEPTS.names))
