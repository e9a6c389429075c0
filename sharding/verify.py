"""Reopen chunks, recompute everything, compare: `python -m sharding verify DATASET.toml`.

Trusts nothing that chunk.json or the index says. Repairs nothing; the problems it returns say what to do.
"""

import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.chunk import (
    Chunk,
    ChunkError,
    ShardFile,
    ShardReader,
    captions_digest,
    check_not_stale,
    chunk_folders,
    load_chunk,
    name_of,
)  # fmt: skip
from sharding.files import sha256_file
from sharding.images import ImageError, decode_rgb
from sharding.schema import Workspace
from sharding.workers import open_pool

logger = logging.getLogger(__name__)

_MANY_PIXELS = 1_000_000_000


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be. key: of the sample, or "" when it concerns the chunk."""

    chunk: str
    what: str
    key: str = ""

    def __str__(self) -> str:
        return f"chunk {self.chunk}: {f'key {self.key}: ' if self.key else ''}{self.what}"


def verify(workspace: Workspace, *, chunk: str | None = None, workers: int = 0) -> list[Problem]:
    """Return every problem of the chunks in `workspace`, or of one; an empty list means all is well.

    Checks shard and index digests, each tar's members against the index, each picture's digest, size and pixels,
    KEY.json and KEY.txt, that a key stands once in a chunk and once in all plain chunks, and that combined chunks
    point at samples that are there. workers: processes, one chunk each at a time; 0 works in this process.
    Raises FileNotFoundError when `chunk` is not there.
    """
    names = [name_of(folder) for folder in chunk_folders(workspace.chunks)]
    if chunk is not None:
        if chunk not in names:
            raise FileNotFoundError(
                f"--chunk {chunk}: no such chunk in {workspace.chunks}; "
                f"there are {', '.join(names[:5]) or 'none'}{' …' if len(names) > 5 else ''}"
            )
        names = [chunk]
    tasks = [(workspace.chunks, name) for name in names]
    problems: list[Problem] = []
    owners: dict[bytes, str] = {}
    with open_pool(workers) as pool:
        results = list(pool.map(_verify_chunk, tasks) if pool is not None else map(_verify_chunk, tasks))
    for (_, name), (found, keys) in zip(tasks, results, strict=True):
        problems += found
        for key in keys:
            if (other := owners.setdefault(key, name)) != name:
                problems.append(Problem(name, f"stands in {other}, too; pack both again after `plan`", key.decode()))
    logger.info("%s chunks verified, %s problems", f"{len(tasks):,}", f"{len(problems):,}")
    return problems


def _verify_chunk(task: tuple[Path, str]) -> tuple[list[Problem], list[bytes]]:
    """Return the problems of one chunk, and its keys if it is plain (combined ones repeat those of others)."""
    root, name = task
    try:
        chunk = load_chunk(root / name)
        check_not_stale(chunk)
        rows = chunk.read_index().to_pylist()
    except ChunkError as error:
        return [Problem(name, str(error))], []
    problems = [Problem(name, what, key) for what, key in _chunk_problems(chunk, rows)]
    keys = [] if chunk.info.is_combined else [row["key"].encode() for row in rows]
    return problems, keys


def _chunk_problems(chunk: Chunk, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    info = chunk.info
    if info.name != name_of(chunk.folder):
        yield f"chunk.json calls it {info.name}; it was moved by hand", ""
    if len(rows) != info.num_samples:
        yield f"the index has {len(rows):,} rows, chunk.json says {info.num_samples:,}", ""
    seen: set[str] = set()
    for row in rows:
        if row["key"] in seen:
            yield "stands twice in the index", row["key"]
        seen.add(row["key"])
    shards = {shard.path: shard for shard in info.shards}
    members: dict[str, dict[str, tuple[int, int]]] = {}
    for shard in info.shards:
        if what := _shard_problem(chunk, shard):
            yield f"shard {shard.path}: {what}", ""
        else:
            members[shard.path] = _members(chunk.shard_path(shard.path))
    for row in rows:
        if row["shard"] not in shards or shards[row["shard"]].sha256 != row["shard_sha256"]:
            yield f"its shard {row['shard']} is not the one that chunk.json names", row["key"]
    if info.is_combined and any("/" in shard.path for shard in info.shards):
        yield from _target_problems(chunk, rows)
        return
    num_members = sum(len(names) for names in members.values())
    if len(members) == len(shards) and num_members != 3 * len(rows):
        yield f"the tars hold {num_members:,} files, the index needs {3 * len(rows):,}", ""
    yield from _sample_problems(chunk, rows, members)


def _shard_problem(chunk: Chunk, shard: ShardFile) -> str:
    path = chunk.shard_path(shard.path)
    stage = "combine" if chunk.info.is_combined and "/" not in shard.path else "pack"
    again = f"run `python -m sharding {stage}` again"
    if not path.exists():
        return f"missing; {again}"
    if (num_bytes := path.stat().st_size) != shard.num_bytes:
        return f"{num_bytes:,} bytes, expected {shard.num_bytes:,}; damaged: delete it and {again}"
    if (actual := sha256_file(path)) != shard.sha256:
        return f"SHA-256 {actual[:12]}…, expected {shard.sha256[:12]}…; damaged: delete it and {again}"
    return ""


def _members(path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(path, "r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def _sample_problems(
    chunk: Chunk, rows: list[dict[str, Any]], members: Mapping[str, Mapping[str, tuple[int, int]]]
) -> Iterator[tuple[str, str]]:
    info = chunk.info
    in_index = captions_digest([row["key"] for row in rows], [row["caption"] for row in rows])
    has_index_captions = info.shard_captions == in_index if info.shard_captions else info.policy == info.shard_policy
    texts: list[str] = []
    reader = ShardReader()
    try:
        for row in rows:
            key, path = row["key"], chunk.shard_path(row["shard"])
            if row["shard"] in members:
                for member, prefix in ((row["image_name"], "image"), (f"{key}.json", "json"), (f"{key}.txt", "txt")):
                    place = (row[f"{prefix}_offset"], row[f"{prefix}_bytes"])
                    if members[row["shard"]].get(member) != place:
                        yield f"{member} is not where the index says it is in {row['shard']}", key
            try:
                image = reader.read(path, row["image_offset"], row["image_bytes"])
                facts = reader.read(path, row["json_offset"], row["json_bytes"])
                text = reader.read(path, row["txt_offset"], row["txt_bytes"]).decode(errors="replace")
            except ChunkError as error:
                yield str(error), key
                continue
            texts.append(text)
            if what := _image_problem(image, row):
                yield what, key
            if what := _facts_problem(facts, row):
                yield what, key
            if has_index_captions and text != row["caption"]:
                yield f"KEY.txt {text[:40]!r}… is not the index's caption of policy {info.policy}", key
    finally:
        reader.close()
    if info.shard_captions and len(texts) == len(rows):
        actual = captions_digest([row["key"] for row in rows], texts)
        if actual != info.shard_captions:
            yield f"the tars' captions are not those of policy {info.shard_policy} that chunk.json names", ""


def _image_problem(image: bytes, row: Mapping[str, Any]) -> str:
    if (actual := hashlib.sha256(image).hexdigest()) != row["sha256"]:
        return f"the picture's SHA-256 is {actual[:12]}…, the index says {row['sha256'][:12]}…"
    try:
        width, height = decode_rgb(image, max_pixels=_MANY_PIXELS).size
    except ImageError as error:
        return f"the picture does not decode: {error}"
    if (width, height) != (row["width"], row["height"]):
        return f"the picture is {width}x{height}, the index says {row['width']}x{row['height']}"
    return ""


def _facts_problem(data: bytes, row: Mapping[str, Any]) -> str:
    try:
        facts = json.loads(data, parse_constant=_refuse_constant)
    except ValueError as error:
        return f"KEY.json is not strict JSON: {error}"
    if not isinstance(facts, dict) or facts.get("key", row["key"]) != row["key"]:
        return "KEY.json belongs to another key"
    if any(value is None for value in facts.values()):
        return "KEY.json holds a null"
    if facts.get("image_sha256", row["sha256"]) != row["sha256"]:
        return "KEY.json names another picture's SHA-256"
    return ""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _target_problems(chunk: Chunk, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Compare the rows of a combined chunk with the rows of the chunks that they point into."""
    targets: dict[tuple[str, str], dict[str, Any]] = {}
    folders = {chunk.shard_path(shard.path).parent for shard in chunk.info.shards}
    for folder in sorted(folders):
        try:
            target_rows = load_chunk(folder).read_index().to_pylist()
        except ChunkError as error:
            yield f"points at a chunk that cannot be read: {error}", ""
            continue
        for row in target_rows:
            targets[str(folder / row["shard"]), row["key"]] = row
    for row in rows:
        target = targets.get((str(chunk.shard_path(row["shard"])), row["key"]))
        if target is None:
            yield f"{row['shard']} does not hold it any more; run `python -m sharding combine` again", row["key"]
            continue
        for name in ("image_offset", "image_bytes", "json_offset", "txt_offset", "sha256", "shard_sha256"):
            if row[name] != target[name]:
                yield f"{name} differs from the sample it points at; run `python -m sharding combine` again", row["key"]
                break
