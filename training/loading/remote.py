"""Chunks of a workspace elsewhere (s3://…, any URL that fsspec knows); a folder here holds what is needed of them.

    mirror   chunk.json and index of all chunks of the run; shards stay where they are
    fetch    the shards of one chunk, each compared with its SHA-256; older ones go when the folder grows too large;
             the shards of the chunk after it follow in the background

A fetched chunk is a chunk like any other. Every rank calls both: one fetches, the others of its machine wait for it.
One folder serves one run at a time. No torch.
"""

import fnmatch
import hashlib
import json
import logging
import os
import posixpath
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.chunk import CHUNK_JSON, HELD_OUT_NAME, SHARDS_ELSEWHERE, Chunk, ChunkError, ShardFile, load_chunk
from sharding.config import ConfigError
from sharding.files import TEMPORARY_MARK, DiskFullError, locked, replacing, size_text, write_bytes
from sharding.schema import Workspace
from training.config.data import DataConfig
from training.errors import RemoteError

logger = logging.getLogger(__name__)

_CLAIM = "remote.json"
_BLOCK_BYTES = 1 << 22
_CONNECTIONS = 4
_HALF_FILE_SECONDS = 3600


def mirror_remote(data: DataConfig, *, held_out: str | None = None) -> None:
    """Bring chunk.json and index of the run's chunks from data.remote, where it is set. Raises as RemoteWorkspace.

    held_out: the chunk of the validation, which no pattern matches.
    """
    if data.remote is not None:
        _remote(data).mirror(data.chunks, held_out=held_out)


def fetch_chunk(data: DataConfig, chunk: Chunk, *, held_out: str | None = None) -> None:
    """Bring the shards of a chunk and of the held-out one, and begin to bring the next one's, where data.remote is."""
    if data.remote is None:
        return
    remote = _remote(data)
    following = remote.after(chunk.name, data.chunks)
    kept = [] if held_out is None else [load_chunk(Workspace(data.workspace).chunks / held_out)]
    for one in (chunk, *kept):
        remote.fetch(one, beside=[chunk, *kept])
    if following is not None and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        threading.Thread(target=remote.fetch_ahead, args=(following, [chunk, *kept]), daemon=True).start()


def _remote(data: DataConfig) -> "RemoteWorkspace":
    assert data.remote is not None
    return RemoteWorkspace(data.remote, data.workspace, int(data.cache_gb * 1e9))


@dataclass(frozen=True)
class RemoteWorkspace:
    """url: of the workspace that holds chunks/; folder: the workspace here; max_bytes: of all shards in it.

    Raises ConfigError when the folder is another workspace or max_bytes too little for one chunk, RemoteError when the
    other side cannot be read, ChunkError when what it has is not what its chunk.json says.
    """

    url: str
    folder: Path
    max_bytes: int

    def mirror(self, patterns: Iterable[str], *, held_out: str | None = None) -> None:
        """Bring chunk.json (last: it makes a chunk) and index of all chunks that match, where they are new.

        held_out: one more chunk, by its name.
        """
        with locked(self.folder), _naming(self.url):
            self._claim()
            files, root = self._files()
            found = {
                name: path
                for path in files.glob(f"{root}/chunks/*/*/{CHUNK_JSON}")
                if _matches(name := "/".join(path.split("/")[-3:-1]), patterns) or name == held_out
            }
            contents = files.cat(list(found.values())) if found else {}
            for name, path in found.items():
                self._mirror_chunk(name, contents[path])

    def after(self, name: str, patterns: Sequence[str]) -> Chunk | None:
        """Return the chunk that a run trains after the named one."""
        chunks = Workspace(self.folder).chunks
        there = ["/".join(path.parts[-3:-1]) for path in sorted(chunks.glob(f"*/*/{CHUNK_JSON}"))]
        order = list(dict.fromkeys(one for pattern in patterns for one in there if _matches(one, [pattern])))
        following = order[order.index(name) + 1 :] if name in order else []
        return load_chunk(chunks / following[0]) if following else None

    def fetch(self, chunk: Chunk, *, beside: Sequence[Chunk] = ()) -> None:
        """Bring the shards of a chunk that are not here. beside: chunks whose shards have to stay."""
        self._make_room(chunk, beside)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda shard: self._bring(chunk, shard), chunk.info.shards))

    def fetch_ahead(self, chunk: Chunk, current: Sequence[Chunk]) -> None:
        """Bring a chunk's shards while others are used; what fails is told, and tried again when it is needed."""
        try:
            self.fetch(chunk, beside=current)
        except (ConfigError, ChunkError, RemoteError, OSError) as error:
            logger.warning("chunk %s is not fetched ahead: %s", chunk.name, error)

    def _files(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            files, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"data.remote: {self.url}: {error}; for s3:// install chunkline[s3]") from error
        return files, root.rstrip("/")

    def _claim(self) -> None:
        """Mark the folder as a mirror: shards in it may be deleted. Raises ConfigError when it is something else."""
        path = self.folder / _CLAIM
        if path.exists():
            if (url := json.loads(path.read_text(encoding="utf-8"))["url"]) != self.url:
                raise ConfigError(f"data.workspace {self.folder} mirrors {url}, not {self.url}; name another folder")
            return
        if Workspace(self.folder).chunks.exists():
            raise ConfigError(
                f"data.workspace {self.folder} is a workspace of its own; with data.remote name a folder that is empty"
            )
        write_bytes(path, json.dumps({"url": self.url}).encode())

    def _mirror_chunk(self, name: str, content: bytes) -> None:
        folder = Workspace(self.folder).chunks / name
        if (folder / CHUNK_JSON).exists() and (folder / CHUNK_JSON).read_bytes() == content:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHARDS_ELSEWHERE).touch()
        try:
            raw = json.loads(content)
            index, sha256 = Path(raw["index"]).name, raw["index_sha256"]  # a name, which leads nowhere else
        except (ValueError, KeyError, TypeError) as error:
            raise ChunkError(f"{self.url}/chunks/{name}/{CHUNK_JSON}: cannot be understood ({error!r})") from error
        self._copy(f"chunks/{name}/{index}", folder / index, sha256)
        write_bytes(folder / CHUNK_JSON, content)

    def _bring(self, chunk: Chunk, shard: ShardFile) -> None:
        path = chunk.shard_path(shard.path)
        if not path.is_relative_to(os.path.normpath(Workspace(self.folder).chunks)) or path.suffix != ".tar":
            raise ChunkError(f"{self.url}/chunks/{chunk.name}: its shard {shard.path!r} is no tar of this workspace")
        if _has_size(path, shard.num_bytes):
            return
        with locked(path.parent):
            if not _has_size(path, shard.num_bytes):  # another process may have brought it meanwhile
                self._copy(posixpath.normpath(f"chunks/{chunk.name}/{shard.path}"), path, shard.sha256)

    def _copy(self, name: str, path: Path, sha256: str) -> None:
        files, root = self._files()
        digest = hashlib.sha256()
        with _naming(f"{self.url}/{name}"), replacing(path) as temporary:
            with files.open(f"{root}/{name}", "rb") as source, temporary.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    target.write(block)
                    digest.update(block)
            if (actual := digest.hexdigest()) != sha256:
                raise ChunkError(
                    f"{self.url}/{name}: damaged: SHA-256 {actual[:12]}…, chunk.json says {sha256[:12]}…; run "
                    "`python -m sharding verify --repair` where it was packed, and copy it again"
                )

    def _make_room(self, chunk: Chunk, beside: Sequence[Chunk]) -> None:
        """Delete the oldest shards that none of the chunks needs until there is room. Raises ConfigError."""
        kept = {one.shard_path(shard.path): shard.num_bytes for one in (chunk, *beside) for shard in one.info.shards}
        if sum(kept.values()) > self.max_bytes:
            names = " and ".join(dict.fromkeys(one.name for one in beside if one.name != chunk.name))
            raise ConfigError(
                f"data.cache_gb: {size_text(self.max_bytes)} is too little for {chunk.name}"
                f"{f' beside {names}' if names else ''}: {size_text(sum(kept.values()))}; raise it"
            )
        with locked(self.folder):
            _remove_half_files(Workspace(self.folder).chunks)
            others = _shards_in(Workspace(self.folder).chunks, except_for=kept)
            excess = sum(size for _, size in others) + sum(kept.values()) - self.max_bytes
            for path, size in others:
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= size


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return not name.endswith(f"/{HELD_OUT_NAME}") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _shards_in(chunks: Path, *, except_for: Collection[Path]) -> list[tuple[Path, int]]:
    """Return other shards with their sizes, the oldest first."""
    # Normalised, as Chunk.shard_path gives them.
    paths = [Path(os.path.normpath(path)) for path in sorted(chunks.glob("*/*/*.tar"))]
    found = [(path, path.stat()) for path in paths if path not in except_for]
    return [(path, facts.st_size) for path, facts in sorted(found, key=lambda item: item[1].st_mtime)]


def _remove_half_files(chunks: Path) -> None:
    """Delete what killed launches left; what another process is writing is younger."""
    for path in chunks.glob(f"*/*/*{TEMPORARY_MARK}*"):
        with suppress(FileNotFoundError):  # it has just got its name
            if time.time() - path.stat().st_mtime > _HALF_FILE_SECONDS:
                path.unlink()


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn errors of the other side into one that names it."""
    try:
        yield
    except DiskFullError:
        raise
    except FileNotFoundError as error:
        raise ChunkError(f"{url}: missing; pack or copy it again") from error
    except OSError as error:
        raise RemoteError(
            f"{url}: cannot be read: {error}; the last saved state is intact: run the same command again"
        ) from error
