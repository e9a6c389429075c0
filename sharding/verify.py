"""Reopen chunks, recompute everything, compare: `python -m sharding verify DATASET.toml`.

Trusts nothing that chunk.json or the index says. Repairs nothing: its problems say what to do, and name the files that
`repair` can make again.
"""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sharding.chunk import (
    CHUNK_JSON,
    Chunk,
    ChunkError,
    ShardFile,
    ShardReader,
    captions_digest,
    check_not_stale,
    chunk_folders,
    load_chunk,
    name_of,
)
from sharding.files import sha256_file
from sharding.images import ImageError, decode_rgb
from sharding.keys import key_numbers
from sharding.schema import Workspace
from sharding.shards import member_names
from sharding.verify_apart import CheckedChunk, Problem, problems_between
from sharding.workers import open_pool

logger = logging.getLogger(__name__)

_MANY_PIXELS = 1_000_000_000


def verify(
    workspace: Workspace, *, chunk: str | None = None, workers: int = 0, names: Sequence[str] | None = None
) -> list[Problem]:
    """Return every problem of the chunks in `workspace`, of one, or of some; an empty list means all is well.

    Checks shard and index digests, each tar's members against the index, each picture's digest, size and pixels,
    masks, KEY.json and KEY.txt, that a key stands once in a chunk and once in all plain chunks, that combined chunks
    point at samples that are there, and that no chunk holds a key, or a relative of one, that is held out.
    workers: processes, one chunk each at a time; 0 works in this process. Memory: 16 bytes per sample, and the index
    of one chunk per worker. Raises FileNotFoundError when `chunk` is not there.
    """
    there = [name_of(folder) for folder in chunk_folders(workspace.chunks)]
    if chunk is not None and chunk not in there:
        raise FileNotFoundError(
            f"--chunk {chunk}: no such chunk in {workspace.chunks}; "
            f"there are {', '.join(there[:5]) or 'none'}{' …' if len(there) > 5 else ''}"
        )
    wanted = [chunk] if chunk is not None else [name for name in there if names is None or name in names]
    tasks = [(workspace.chunks, name) for name in wanted]
    with open_pool(workers) as pool:
        checked = list(pool.map(_verify_chunk, tasks) if pool is not None else map(_verify_chunk, tasks))
    problems = [problem for one in checked for problem in one.problems]
    problems += problems_between(workspace, checked)
    logger.info("%s chunks verified, %s problems", f"{len(tasks):,}", f"{len(problems):,}")
    return problems


def _verify_chunk(task: tuple[Path, str]) -> CheckedChunk:
    root, name = task
    nothing = np.empty(0, dtype=np.uint64)
    file = CHUNK_JSON
    try:
        chunk = load_chunk(root / name)
        file = chunk.info.index
        check_not_stale(chunk)
        index = chunk.read_index()
    except ChunkError as error:
        return CheckedChunk(name, [Problem(name, str(error), file=file)], nothing)
    problems = list(_chunk_problems(chunk, index.to_pylist()))
    keys = key_numbers(index.column("key"))
    return CheckedChunk(name, problems, keys, chunk.info.is_combined, chunk.info.is_held_out)


def _chunk_problems(chunk: Chunk, rows: list[dict[str, Any]]) -> Iterator[Problem]:
    info, name = chunk.info, name_of(chunk.folder)
    if info.name != name:
        yield Problem(name, f"chunk.json calls it {info.name}; it was moved by hand")
    if len(rows) != info.num_samples:
        yield Problem(name, f"the index has {len(rows):,} rows, chunk.json says {info.num_samples:,}")
    seen: set[str] = set()
    for row in rows:
        if row["key"] in seen:
            yield Problem(name, "stands twice in the index", row["key"])
        if row["repeats"] < 1 or not row["loss_weight"] > 0:
            yield Problem(name, f"repeats {row['repeats']}, loss_weight {row['loss_weight']}: it would not be trained",
                          row["key"])  # fmt: skip
        seen.add(row["key"])
    shards = {shard.path: shard for shard in info.shards}
    members: dict[str, dict[str, tuple[int, int]]] = {}
    for shard in info.shards:
        if what := _shard_problem(chunk, shard):
            yield Problem(name, f"shard {shard.path}: {what}", file="" if "/" in shard.path else shard.path)
        else:
            members[shard.path] = shard_members(chunk.shard_path(shard.path))
    for row in rows:
        if row["shard"] not in shards or shards[row["shard"]].sha256 != row["shard_sha256"]:
            yield Problem(name, f"its shard {row['shard']} is not the one that chunk.json names", row["key"])
    if info.is_combined and any("/" in shard.path for shard in info.shards):
        found = _target_problems(chunk, rows)
    else:
        num_members, num_needed = sum(map(len, members.values())), sum(len(member_names(row)) for row in rows)
        if len(members) == len(shards) and num_members != num_needed:
            yield Problem(name, f"the tars hold {num_members:,} files, the index needs {num_needed:,}")
        found = _sample_problems(chunk, rows, members)
    for what, key in found:
        yield Problem(name, what, key)


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


def shard_members(path: Path) -> dict[str, tuple[int, int]]:
    """Return name → (offset, bytes) of the members of a tar, in their order."""
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
            key = row["key"]
            if row["shard"] in members:
                for prefix, member in member_names(row).items():
                    if members[row["shard"]].get(member) != (row[f"{prefix}_offset"], row[f"{prefix}_bytes"]):
                        yield f"{member} is not where the index says it is in {row['shard']}", key
            try:
                image, facts, raw_text, mask = (
                    reader.read_member(chunk.folder, row, place) for place in ("image", "json", "txt", "mask")
                )
            except ChunkError as error:
                yield str(error), key
                continue
            text = raw_text.decode(errors="replace")
            texts.append(text)
            if mask and (what := _mask_problem(mask, row)):
                yield what, key
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


def _mask_problem(mask: bytes, row: Mapping[str, Any]) -> str:
    try:
        size = decode_rgb(mask, max_pixels=_MANY_PIXELS).size
    except ImageError as error:
        return f"the mask does not decode: {error}"
    with Image.open(io.BytesIO(mask)) as image:
        kind = (image.format, image.mode)
    if kind != ("PNG", "L") or size != (row["width"], row["height"]):
        return f"the mask is {kind[0]} {kind[1]} of {size[0]}x{size[1]}, not grey PNG of the picture's size"
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
