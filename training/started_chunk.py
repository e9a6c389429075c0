"""A run's own copy of a chunk: index and chunk.json as they were when the run started it; shards stay where they are.

Nothing done to the workspace changes what a half-trained chunk is.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from sharding.chunk import CHUNK_JSON, Chunk, ChunkError, load_chunk, read_index
from sharding.files import replacing, write_json

logger = logging.getLogger(__name__)

INDEX = "index.parquet"
SOURCE = "source.json"


@dataclass(frozen=True)
class StartedChunk(Chunk):
    """A chunk as the run started it: the index is the run's copy, the shards are in the chunk's own folder."""

    copy_folder: Path

    @property
    def index_path(self) -> Path:
        return self.copy_folder / INDEX

    def read_index(self) -> pa.Table:
        """Read the run's copy of the index. Raises ChunkError when it is missing or damaged."""
        return read_index(self.index_path, expected_sha256=self.info.index_sha256)

    def require_shards(self) -> None:
        """Raise ChunkError when a shard is missing or has another size. Looks at each once, reads none."""
        for shard in self.info.shards:
            path = self.shard_path(shard.path)
            try:
                num_bytes = path.stat().st_size
            except FileNotFoundError:
                raise ChunkError(
                    f"chunk {self.name}: shard {path} is missing, and this run has started the chunk with it; "
                    "restore it, or name the chunk's new place if the workspace moved"
                ) from None
            if num_bytes != shard.num_bytes:
                raise ChunkError(
                    f"chunk {self.name}: shard {path} has {num_bytes:,} bytes, {shard.num_bytes:,} are right: it was "
                    "cut short or replaced; run `python -m sharding verify`, then restore it or pack the chunk again"
                )


def copy_chunk(chunk: Chunk, folder: Path) -> None:
    """Copy what a run keeps of a chunk into `folder`. Raises ChunkError when the index is damaged."""
    chunk.read_index()  # verified before it is copied
    with replacing(folder / INDEX) as temporary:
        shutil.copyfile(chunk.index_path, temporary)
    write_json(folder / SOURCE, {"folder": str(chunk.folder.absolute())})
    write_json(folder / CHUNK_JSON, asdict(replace(chunk.info, index=INDEX)))  # last: this is the commit


def read_copy(copy_folder: Path, *, chunk_folder: Path | None = None) -> StartedChunk | None:
    """Return the copy in `copy_folder`; None when there is none.

    chunk_folder: where the chunk lies now; where it was at the start when None. A chunk that moved is noted.
    Raises ChunkError when the copy is damaged.
    """
    if not (copy_folder / CHUNK_JSON).exists():
        return None
    info = load_chunk(copy_folder).info
    try:
        folder = Path(json.loads((copy_folder / SOURCE).read_text(encoding="utf-8"))["folder"])
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise ChunkError(
            f'{copy_folder / SOURCE}: missing or damaged; restore it: {{"folder": "the chunk\'s folder"}}'
        ) from error
    if chunk_folder is not None and chunk_folder.absolute() != folder:
        logger.info("chunk %s: shards are now read from %s, not %s", info.name, chunk_folder, folder)
        folder = chunk_folder.absolute()
        write_json(copy_folder / SOURCE, {"folder": str(folder)})
    return StartedChunk(folder=folder, info=info, copy_folder=copy_folder)
