"""Chunks of concepts on disk: what is there, what has to be written anew, and what is no stage's any more.

A chunk is written whole: its tars under names with their digests, then its index, then chunk.json, which is the only
commit. What a run has started keeps its tars. Pixels are `sharding.packing`'s, the format is `sharding.chunk`'s.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
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
)
from sharding.files import digest_of, locked, require_free_bytes
from sharding.images import MAX_PIXELS
from sharding.packing.shard import BUILDING, ShardTask, pack_shard
from sharding.packing.stored_image import ImagePolicy
from sharding.schema import CAPTIONS, INDEX, MANIFEST, OF_CONCEPTS, PLAN, Workspace
from training.dreambooth.packing.rows import Row
from training.errors import BrokenDataError
from training.stages import CONCEPTS

POLICY = "concepts"
"""What chunk.json says of chunks that were packed here."""
HELD_OUT = f"{CONCEPTS}/{HELD_OUT_NAME}"
_IMAGES = ImagePolicy(
    jpeg_quality=95, lossless_as_png=True, reencode="needed", max_pixels=0, pass_through_formats=(),
    min_source_pixels=0, max_source_pixels=MAX_PIXELS,
)  # fmt: skip
_SHARD_SIZE = 1_000
_FORMAT = 1
"""Counted up when the same rows are written otherwise: all chunks are then packed again."""
_BYTES_PER_MEMBERS = 6_000
_RECORDS = pa.schema(
    {
        field.name: field.type
        for field in (*MANIFEST, PLAN.field("repeats"), PLAN.field("loss_weight"), INDEX.field("period"), *CAPTIONS)
    }.items()
)


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
        return digest_of([_FORMAT, asdict(_IMAGES), self.shares_samples, facts])


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
    sources = _sources(wanted.rows)
    roots = {source: root for (_, root), source in sources.items()}
    records = [_record(row, sources[row.label, row.picture.root]) for row in wanted.rows]
    table = pa.Table.from_pylist(records, schema=_RECORDS)
    tasks = [
        ShardTask(folder, number, table.slice(start, _SHARD_SIZE), roots, _IMAGES)
        for number, start in enumerate(range(0, table.num_rows, _SHARD_SIZE))
    ]
    finished = [pack_shard(task) for task in tasks]
    for row in (row for one in finished for row in one.drops.to_pylist()):
        raise BrokenDataError(
            f"{roots[row['source']] / row['path']}: {row['reason']}: {row['detail']}: it changed while it was packed; "
            "run the same command again"
        )
    index = _with_turns(pa.concat_tables([one.rows for one in finished]), wanted.rows)
    chunk = commit_chunk(
        folder,
        index,
        name=wanted.name,
        shards=[one.shard for one in finished if one.shard is not None],
        policy=POLICY,
        shard_policy=POLICY,
        made_from=wanted.made_from,
        seed=seed,
        is_combined=wanted.shares_samples,
        is_held_out=wanted.is_held_out,
        shards_from=wanted.made_from,
        shard_captions=captions_digest(index.column("key").to_pylist(), index.column("caption").to_pylist()),
    )
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    if not is_sealed(folder):
        remove_unnamed(chunk)
    return chunk


def remove_chunk(chunk: Chunk) -> None:
    """Take a chunk away. What a run has started is only not listed any more; its tars stay for that run."""
    (chunk.folder / CHUNK_JSON).unlink()
    if not is_sealed(chunk.folder):
        shutil.rmtree(chunk.folder)


def _sources(rows: Sequence[Row]) -> dict[tuple[str, Path], str]:
    """Return a name for each folder that pictures of a label are from: KEY.json names that, not the folder."""
    names: dict[tuple[str, Path], str] = {}
    for row in rows:
        place = (row.label, row.picture.root)
        if place not in names:
            number = sum(label == row.label for label, _ in names) + 1
            names[place] = row.label if number == 1 else f"{row.label} {number}"
    return names


def _record(row: Row, source: str) -> dict[str, Any]:
    picture, facts = row.picture, row.picture.facts
    lists: dict[str, list[str]] = {name: [] for name in _RECORDS.names if name.startswith("tags_")}
    return {
        "key": row.key,
        "sha256": picture.sha256,
        "dataset": row.label,
        "source": source,
        "path": picture.path,
        "num_bytes": picture.num_bytes,
        "format": facts.format,
        "width": facts.width,
        "height": facts.height,
        "has_alpha": facts.has_alpha,
        "is_animated": facts.is_animated,
        "is_pass_through": facts.is_pass_through,
        "rating": "",
        **lists,
        "custom": [],
        "period": "",
        "repeats": row.turn.repeats,
        "loss_weight": row.loss_weight,
        "text": row.text,
        "groups": [],
    }


def _with_turns(index: pa.Table, rows: Sequence[Row]) -> pa.Table:
    by_key = {row.key: row for row in rows}
    own = [by_key[key] for key in index.column("key").to_pylist()]
    values = {
        "concept": [row.label for row in own],
        "every_epochs": [row.turn.every for row in own],
        "epoch_offset": [row.turn.offset for row in own],
    }
    for field in OF_CONCEPTS:
        index = index.append_column(field, pa.array(values[field.name], field.type))
    return index
