"""Images in the shards of chunks, found by key: for a workspace whose source files are gone, or on request.

A chunk's index says where each image lies, so no tar is searched. Pictures that were resized or encoded anew when they
were packed are looked at as they were packed.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import Chunk, ChunkError, check_not_stale, list_chunks
from sharding.config import ConfigError
from sharding.tables import read_part

logger = logging.getLogger(__name__)

ALL_CHUNKS = "all"


@dataclass(frozen=True)
class ImageInTar:
    """The bytes of an image inside a tar."""

    tar: Path
    offset: int
    num_bytes: int
    sha256: str

    def read(self) -> bytes:
        """Return the bytes. Raises OSError."""
        with self.tar.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.num_bytes)

    def is_whole(self, data: bytes) -> bool:
        """Tell whether these are the bytes that were packed."""
        return hashlib.sha256(data).hexdigest() == self.sha256


class ImagesInTars:
    """The images of some chunks."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks

    @classmethod
    def open(cls, root: Path, names: Sequence[str]) -> "ImagesInTars":
        """Open chunks by name, `newest/0004`, or all that are not stale. Raises ConfigError."""
        chunks = {chunk.name: chunk for chunk in list_chunks(root, with_held_out=True)}
        wanted = list(chunks) if ALL_CHUNKS in names else list(dict.fromkeys(names))
        opened = []
        for name in wanted:
            if name not in chunks:
                known = ", ".join(list(chunks)[:10]) or "none"
                raise ConfigError(f"--chunks {name}: no such chunk in {root}; there are {known}")
            try:
                check_not_stale(chunks[name])
            except ChunkError as error:
                if name in names:
                    raise ConfigError(f"--chunks {name}: {error}") from error
                logger.warning("%s is left out: %s", name, error)
                continue
            opened.append(chunks[name])
        return cls(opened)

    def find(self, keys: Sequence[str]) -> dict[str, ImageInTar]:
        """Return where those of the keys lie that are in one of the chunks."""
        wanted = pa.array(keys, pa.string())
        found: dict[str, ImageInTar] = {}
        for chunk in self._chunks:
            index = read_part(chunk.index_path, ["key", "shard", "image_offset", "image_bytes", "sha256"])
            for row in index.filter(pc.is_in(index.column("key"), wanted)).to_pylist():
                tar = chunk.shard_path(row["shard"])
                found[row["key"]] = ImageInTar(tar, row["image_offset"], row["image_bytes"], row["sha256"])
        return found
