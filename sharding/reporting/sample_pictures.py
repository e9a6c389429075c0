"""Pick pictures to look at and make thumbnails of them.

The choice is seeded and depends on keys only, so the same workspace shows the same pictures. Pixels come from the
chunk when a picture is packed, else from its file; one that can be read from neither is left out.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from sharding.chunk import CHUNK_JSON, Chunk, ChunkError, ShardReader, chunk_name, load_chunk
from sharding.config import DatasetConfig
from sharding.images import ImageError, decode_rgb
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import MANIFEST, PLAN, Workspace
from sharding.sources import read_file
from sharding.tables import list_parts

logger = logging.getLogger(__name__)

SIDE = 192
"""Pixels of a thumbnail's longer side."""
_QUALITY = 60
_MAX_SOURCE_BYTES = 64 << 20


@dataclass(frozen=True)
class Thumbnail:
    """A small WebP. width, height: pixels of the thumbnail."""

    key: str
    width: int
    height: int
    webp: bytes
    caption: str
    """As packed; "" when the picture is not packed."""


def pick_keys(workspace: Workspace, *, num_per_dataset: int, seed: int) -> dict[str, list[str]]:
    """Return the keys of some planned pictures by dataset; without a plan, of kept pictures by source."""
    if num_per_dataset < 1:
        return {}
    plan, kept = list_parts(workspace.plan), list_parts(workspace.kept)
    table, by = (rows_of(plan, PLAN), "dataset") if plan else (rows_of(kept, MANIFEST), "source")
    chosen = f"arg_min(key, md5(key || {quoted(seed)}), {num_per_dataset})"
    with Questions() as questions:
        rows = questions.ask(f"select {by} as name, {chosen} as keys from {table} group by {by} order by {by}")
    return {row["name"]: list(row["keys"]) for row in rows}


def make_thumbnails(
    config: DatasetConfig, workspace: Workspace, keys: Iterable[str], *, max_bytes: int
) -> dict[str, Thumbnail]:
    """Return thumbnails by key, in the order given, until their bytes reach `max_bytes`; a key counts each time."""
    uses = Counter(keys)
    wanted = list(uses)
    packed = _packed_places(workspace, wanted)
    files = _source_files(config, workspace, wanted)
    thumbnails: dict[str, Thumbnail] = {}
    num_bytes = 0
    reader = ShardReader()
    try:
        for key in wanted:
            thumbnail = _thumbnail(key, packed.get(key), files.get(key, ()), reader)
            if thumbnail is None:
                continue
            num_bytes += len(thumbnail.webp) * uses[key]
            if num_bytes > max_bytes:
                break
            thumbnails[key] = thumbnail
    finally:
        reader.close()
    return thumbnails


@dataclass(frozen=True)
class _Place:
    shard: Path
    offset: int
    num_bytes: int
    caption: str


def _thumbnail(key: str, place: _Place | None, files: Iterable[Path], reader: ShardReader) -> Thumbnail | None:
    caption = place.caption if place is not None else ""
    for data in _bytes_of(place, files, reader):
        try:
            image = decode_rgb(data, min_side=SIDE)
        except ImageError:
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=_QUALITY)
        return Thumbnail(key, image.width, image.height, buffer.getvalue(), caption)
    return None


def _bytes_of(place: _Place | None, files: Iterable[Path], reader: ShardReader) -> Iterable[bytes]:
    if place is not None:
        try:
            yield reader.read(place.shard, place.offset, place.num_bytes)
        except ChunkError as error:
            logger.warning("%s", error)
    for path in files:
        try:
            yield read_file(path, max_bytes=_MAX_SOURCE_BYTES)
        except OSError as error:
            logger.info("no thumbnail of %s: %s", path, error.strerror or error)


def _packed_places(workspace: Workspace, keys: list[str]) -> dict[str, _Place]:
    plan = list_parts(workspace.plan)
    if not plan or not keys:
        return {}
    names = ", ".join(quoted(key) for key in keys)
    with Questions() as questions:
        rows = questions.ask(
            f"select dataset, chunk, list(key) as keys from {rows_of(plan, PLAN)} where key in ({names}) group by all"
        )
    places: dict[str, _Place] = {}
    for row in rows:
        folder = workspace.chunks / chunk_name(row["dataset"], row["chunk"])
        if (folder / CHUNK_JSON).is_file():
            places |= _places_in(load_chunk(folder), row["keys"])
    return places


def _places_in(chunk: Chunk, keys: list[str]) -> dict[str, _Place]:
    if not chunk.index_path.is_file():
        return {}
    columns = ["key", "shard", "image_offset", "image_bytes", "caption"]
    found = pq.read_table(chunk.index_path, columns=columns, filters=pc.field("key").isin(keys), partitioning=None)
    return {
        row["key"]: _Place(chunk.shard_path(row["shard"]), row["image_offset"], row["image_bytes"], row["caption"])
        for row in found.to_pylist()
    }


def _source_files(config: DatasetConfig, workspace: Workspace, keys: list[str]) -> Mapping[str, list[Path]]:
    parts = list_parts(workspace.manifest)
    if not parts or not keys:
        return {}
    names = ", ".join(quoted(key) for key in keys)
    with Questions() as questions:
        rows = questions.ask(
            f"select key, source, path from {rows_of(parts, MANIFEST)} where key in ({names}) order by all"
        )
    files: dict[str, list[Path]] = {}
    for row in rows:
        if row["source"] in config.sources:
            files.setdefault(row["key"], []).append(config.sources[row["source"]].root / PurePosixPath(row["path"]))
    return files
