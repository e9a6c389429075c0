"""Make damaged files of chunks again: `python -m sharding verify DATASET.toml --repair`.

A damaged shard is written anew from its sources and taken when its digest is the one that chunk.json names; a damaged
index is read off the tars; a combined chunk is mixed again. Only where that does not give the same bytes (captions or
sources have changed since) is the whole chunk packed anew, and not when a run has trained it and its keys changed.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from sharding.chunk import CHUNK_JSON, Chunk, ChunkError, ShardReader, commit_chunk, is_sealed, load_chunk
from sharding.combine import restore
from sharding.config import DatasetConfig
from sharding.files import locked, require_free_bytes
from sharding.pack import pack_chunk, shard_tasks
from sharding.packing.jobs import Job, job_digest, make_jobs, planned_chunks, require_captions
from sharding.packing.rows import jobs_with_rows
from sharding.packing.shard import BUILDING, pack_shard
from sharding.schema import INDEX, PLAN, Workspace
from sharding.shards import mask_name
from sharding.tables import read_parts
from sharding.verify import shard_members, verify
from sharding.verify_apart import Problem
from sharding.workers import open_pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairReport:
    """What repairing did and what is left."""

    restored: tuple[str, ...]
    """Files that are again what chunk.json names, as CHUNK/FILE."""
    packed_anew: tuple[str, ...]
    """Chunks that had to be packed as a whole; their digest may differ from before."""
    left: tuple[Problem, ...]

    def summary(self) -> str:
        """Return one line per thing done, then what is left."""
        lines = [f"restored {name}" for name in self.restored]
        lines += [f"packed anew {name}" for name in self.packed_anew]
        lines += [str(problem) for problem in self.left]
        return "\n".join(lines) if lines else "no problems"


def repair(
    config: DatasetConfig, workspace: Workspace, problems: Sequence[Problem], *, workers: int = 0
) -> RepairReport:
    """Make again what `problems` of `verify` name as damaged, then verify those chunks again.

    Raises what `pack` raises: missing sources or captions, a full disk, too many unusable files.
    """
    damage: dict[str, set[str]] = {}
    for problem in problems:
        if problem.file:
            damage.setdefault(problem.chunk, set()).add(problem.file)
    combined = {name: damage.pop(name) for name in sorted(damage) if name.split("/")[0] == config.combine.name}
    restored, packed_anew = _repair_plain(config, workspace, damage, workers=workers)
    restored += _repair_combined(config, workspace, combined)
    left = [problem for problem in problems if problem.other]
    names = {problem.chunk for problem in problems if not problem.other}
    left += [problem for problem in verify(workspace, workers=workers, names=sorted(names)) if problem not in left]
    return RepairReport(tuple(restored), tuple(packed_anew), tuple(left))


def _repair_plain(
    config: DatasetConfig, workspace: Workspace, damage: dict[str, set[str]], *, workers: int
) -> tuple[list[str], list[str]]:
    planned = planned_chunks(read_parts(workspace.plan, schema=PLAN), workspace.chunks)
    wanted = {workspace.chunks / name: planned[workspace.chunks / name] for name in sorted(damage)
              if workspace.chunks / name in planned}  # fmt: skip
    jobs = make_jobs(config, workspace, wanted)
    require_captions(workspace, config.pack.policy, jobs)
    require_free_bytes(workspace.chunks, max((job.num_bytes for job in jobs), default=0), "repairing")
    restored: list[str] = []
    packed_anew: list[str] = []
    with open_pool(workers) as pool:
        for job in jobs_with_rows(workspace, config.pack.policy, jobs):
            with locked(job.folder):
                files = damage[job.name]
                chunk = _loaded(job)
                if chunk is not None and _restore_files(job, chunk, files, config):
                    restored += [f"{job.name}/{file}" for file in sorted(files)]
                elif chunk is None or not is_sealed(job.folder) or chunk.info.shards_from == job.shards_from:
                    pack_chunk(replace(job, old=chunk), config, workspace, pool=pool, made_from=job_digest(job, config))
                    packed_anew.append(job.name)
                shutil.rmtree(job.folder / BUILDING, ignore_errors=True)
                logger.info("%s repaired", job.name)
    return restored, packed_anew


def _loaded(job: Job) -> Chunk | None:
    try:
        return load_chunk(job.folder)
    except ChunkError:
        return None


def _restore_files(job: Job, chunk: Chunk, files: set[str], config: DatasetConfig) -> bool:
    """Write the damaged shards, then the damaged index. Return whether all are what chunk.json names."""
    tasks = {task.number: task for task in shard_tasks(job, config)}
    for shard in chunk.info.shards:
        if shard.path not in files:
            continue
        task = tasks.get(int(shard.path.split("-")[1].removesuffix(".tar")))
        if task is None:
            return False
        found = pack_shard(task).shard
        if found is None or found.sha256 != shard.sha256:
            if found is not None:
                (job.folder / found.path).unlink()
            return False
    if chunk.info.index in files:
        return _restore_index(job, chunk)
    return True


def _restore_index(job: Job, chunk: Chunk) -> bool:
    """Commit the index that today's captions and the tars give; the run's digest stays when they are the same."""
    records = {row["key"]: row for row in job.records.to_pylist()}
    rows = _rows_of_tars(chunk, records)
    if rows is None:
        return False
    info = chunk.info
    values = {name: getattr(info, name) for name in (
        "name", "shards", "policy", "shard_policy", "made_from", "seed", "is_held_out", "num_dropped", "shards_from",
        "shard_captions",
    )}  # fmt: skip
    again = commit_chunk(job.folder, pa.Table.from_pylist(rows, schema=INDEX), **values)
    return again.info.index_sha256 == info.index_sha256


def _rows_of_tars(chunk: Chunk, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return index rows as the tars have them, with today's captions; None when a key is not planned here any more."""
    rows: list[dict[str, Any]] = []
    reader = ShardReader()
    try:
        for shard in chunk.info.shards:
            path = chunk.shard_path(shard.path)
            members = shard_members(path)
            for key in dict.fromkeys(name.partition(".")[0] for name in members):
                if key not in records:
                    return None
                facts = json.loads(reader.read(path, *members[f"{key}.json"]))
                rows.append(
                    _row(key, facts, members, records[key]) | {"shard": shard.path, "shard_sha256": shard.sha256}
                )
    finally:
        reader.close()
    return rows


def _row(
    key: str, facts: dict[str, Any], members: dict[str, tuple[int, int]], record: dict[str, Any]
) -> dict[str, Any]:
    own = {f"{key}.json", f"{key}.txt", mask_name(key)}
    image_name = next(name for name in members if name.partition(".")[0] == key and name not in own)
    row = {name: record[name] for name in ("groups", "dataset", "period", "repeats", "loss_weight")}
    row |= {"key": key, "image_name": image_name, "caption": record["text"], "sha256": facts["image_sha256"],
            "width": facts["width"], "height": facts["height"]}  # fmt: skip
    names = {"image": image_name, "json": f"{key}.json", "txt": f"{key}.txt", "mask": mask_name(key)}
    for place, name in names.items():
        row[f"{place}_offset"], row[f"{place}_bytes"] = members.get(name, (0, 0))
    return row


def _repair_combined(config: DatasetConfig, workspace: Workspace, damage: dict[str, set[str]]) -> list[str]:
    names = [name for name, files in damage.items() if CHUNK_JSON not in files]
    done = restore(config, workspace, names)
    return [f"{name}/{file}" for name in done for file in sorted(damage[name])]
