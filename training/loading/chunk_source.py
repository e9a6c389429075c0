"""Where a chunk's samples lie, and their bytes: read by offset and compared with what the index says of them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sharding.chunk import Chunk, ChunkError, ShardReader, read_index, shard_path


@dataclass(frozen=True)
class ChunkSource:
    """Where a chunk's samples lie. Small: this, not the index, goes to the workers; each reads the index once."""

    index_path: Path
    """The index, or a run's copy of it."""
    folder: Path
    """The chunk's folder: shards named in the index are relative to it, wherever the index lies."""
    index_sha256: str | None = None
    """Checked when given."""

    @classmethod
    def of_chunk(cls, chunk: Chunk, index_path: Path | None = None) -> "ChunkSource":
        """Return the source of a committed chunk, read through `index_path` when a run has its own copy."""
        return cls(index_path or chunk.index_path, chunk.folder, chunk.info.index_sha256)

    def read_index(self) -> pa.Table:
        """Read the index. Raises ChunkError when it is missing, damaged or another one."""
        return read_index(self.index_path, expected_sha256=self.index_sha256)

    def shard_path(self, shard: str) -> Path:
        """Return where a shard named in the index lies."""
        return shard_path(self.folder, shard)

    def require_shards(self, shards: Iterable[str]) -> None:
        """Raise ChunkError when one of them is missing: one look per shard, none per image."""
        paths = sorted({self.shard_path(shard) for shard in shards})
        if missing := [path for path in paths if not path.is_file()]:
            raise ChunkError(
                f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}; "
                "run `python -m sharding verify`"
            )


class SampleBytes:
    """Reads images and masks of a chunk. One per process: neither open files nor positions are shared."""

    def __init__(self, source: ChunkSource, *, with_checksum: bool) -> None:
        self._source, self._with_checksum = source, with_checksum
        self._reader = ShardReader()

    def image(self, row: Mapping[str, Any]) -> bytes:
        """Return the image of an index row, as it was packed.

        Raises ChunkError naming the shard when it is missing, cut short, cannot be read, or holds other bytes than the
        index says: the shard is damaged then, not the picture.
        """
        data = self._member(row, "image")
        if self._with_checksum and (actual := hashlib.sha256(data).hexdigest()) != row["sha256"]:
            raise ChunkError(
                f"{self._source.shard_path(row['shard'])}: damaged: the image {row['key']} at byte "
                f"{row['image_offset']:,} has SHA-256 {actual[:12]}…, the index says {row['sha256'][:12]}…; run "
                "`python -m sharding verify --repair`, or restore the shard, then run the same command again"
            )
        return data

    def mask(self, row: Mapping[str, Any]) -> bytes:
        """Return the PNG of the mask, b"" when there is none. Raises ChunkError as `image` does, but for other bytes:
        a PNG has checksums of its own."""
        return self._member(row, "mask")

    def close(self) -> None:
        """Close the files this process has open; the next read opens them again."""
        self._reader.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _sample_bytes, (self._source, self._with_checksum)

    def _member(self, row: Mapping[str, Any], place: str) -> bytes:
        try:
            return self._reader.read_member(self._source.folder, row, place)
        except OSError as error:
            path = self._source.shard_path(row["shard"])
            raise ChunkError(
                f"{path}: cannot be read: {error}; look at the disk, then run the same command again"
            ) from error


def _sample_bytes(source: ChunkSource, with_checksum: bool) -> SampleBytes:
    return SampleBytes(source, with_checksum=with_checksum)
