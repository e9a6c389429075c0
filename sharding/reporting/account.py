"""Account for every listed file exactly once: packed, dropped (by the first stage that did) or waiting for a stage.

Counts files, by source and by drop reason. Pictures are counted by `census`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.chunk import Chunk
from sharding.reporting.questions import Questions, rows_of
from sharding.schema import DROPS, LISTING, MANIFEST, PLAN, Workspace
from sharding.tables import list_parts

STAGES = ("scan", "dedupe", "plan", "pack")


@dataclass(frozen=True)
class SourceCount:
    """What became of the files of a source."""

    name: str
    num_files: int
    num_bytes: int
    num_packed: int
    num_dropped: int
    num_waiting: int


@dataclass(frozen=True)
class StageCount:
    """Files that a stage dropped for a reason, or (reason "") that wait for the stage."""

    stage: str
    reason: str
    num_files: int


@dataclass(frozen=True)
class Account:
    """The sums over all files."""

    sources: tuple[SourceCount, ...]
    drops: tuple[StageCount, ...]
    waiting: tuple[StageCount, ...]
    num_unlisted_packed: int
    """Packed samples whose file is in no listing."""


def take_account(questions: Questions, workspace: Workspace, chunks: Sequence[Chunk]) -> Account:
    """Count the files of a workspace; `chunks`: its plain (not combined) ones."""
    sources: dict[str, dict[str, int]] = {}
    drops: dict[tuple[str, str], int] = {}
    waiting: dict[str, int] = {}
    num_unlisted = 0
    for row in questions.ask(_outcomes(workspace, [chunk.index_path for chunk in chunks])):
        count, stage = row["num_files"], row["stage"]
        if not row["is_listed"]:
            num_unlisted += count
            continue
        sums = sources.setdefault(row["source"], {"files": 0, "bytes": 0, "packed": 0, "dropped": 0, "waiting": 0})
        sums["files"] += count
        sums["bytes"] += row["num_bytes"]
        sums[row["outcome"]] += count
        if row["outcome"] == "dropped":
            drops[stage, row["reason"]] = drops.get((stage, row["reason"]), 0) + count
        elif row["outcome"] == "waiting":
            waiting[stage] = waiting.get(stage, 0) + count
    return Account(
        sources=tuple(SourceCount(name, *sums.values()) for name, sums in sorted(sources.items())),
        drops=tuple(
            StageCount(stage, reason, count)
            for (stage, reason), count in sorted(drops.items(), key=lambda item: (_place(item[0][0]), item[0]))
        ),
        waiting=tuple(StageCount(stage, "", waiting[stage]) for stage in STAGES if stage in waiting),
        num_unlisted_packed=num_unlisted,
    )


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def drop_parts(workspace: Workspace) -> list[Path]:
    """Return all files of schema DROPS, in the order of the stages."""
    folders = [workspace.dedupe / "drops", workspace.plan / "drops"]
    parts = [part for folder in folders for part in list_parts(folder)]
    return parts + sorted(workspace.pack_drops.glob("*.parquet"))


def _outcomes(workspace: Workspace, indexes: Sequence[Path]) -> str:
    """Ask for (source, outcome, stage, reason, is_listed, num_files, num_bytes), every file in exactly one row.

    A file's outcome is the first of: packed, dropped at scan, dedupe, plan, pack, waiting for the earliest stage that
    has not seen it. Of several files with a packed key, the kept one is the packed one.
    """
    manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
    listing = rows_of(list_parts(workspace.listing), LISTING) if list_parts(workspace.listing) else manifest
    place = "coalesce(list_position([" + ", ".join(f"'{stage}'" for stage in STAGES) + "], stage), 99)"
    return f"""
        with
        scanned as (
            select source, path, any_value(key) as key, any_value(status) as status, any_value(num_bytes) as num_bytes
            from {manifest} group by source, path),
        listed as (select source, path, max(num_bytes) as num_bytes from {listing} group by source, path),
        files as (
            select coalesce(listed.source, scanned.source) as source, coalesce(listed.path, scanned.path) as path,
                coalesce(listed.num_bytes, scanned.num_bytes) as num_bytes, key, status,
                listed.source is not null as is_listed
            from listed full join scanned on listed.source = scanned.source and listed.path = scanned.path),
        kept as (select distinct source, path, key from {rows_of(list_parts(workspace.kept), MANIFEST)}),
        packed_keys as (select distinct key from {rows_of(indexes, PLAN)}),
        planned_keys as (select distinct key from {rows_of(list_parts(workspace.plan), PLAN)}),
        packed as (
            select source, path from (
                select files.source, files.path, row_number() over (
                    partition by files.key
                    order by kept.key is not null desc, files.status = 'kept' desc, files.source, files.path) as place
                from files join packed_keys using (key)
                left join kept on files.source = kept.source and files.path = kept.path and files.key = kept.key)
            where place = 1),
        drops as (
            select source, path, arg_min(reason, {place}) as reason, arg_min(stage, {place}) as stage
            from {rows_of(drop_parts(workspace), DROPS)} group by source, path),
        judged as (
            select files.source, num_bytes, is_listed,
                case when packed.path is not null then 'packed'
                    when files.status <> 'kept' or drops.path is not null then 'dropped'
                    else 'waiting' end as outcome,
                case when packed.path is not null then ''
                    when files.status is null then 'scan'
                    when files.status <> 'kept' then 'scan'
                    when drops.path is not null then drops.stage
                    when kept.path is null then 'dedupe'
                    when planned_keys.key is null then 'plan'
                    else 'pack' end as stage,
                case when packed.path is not null then ''
                    when files.status <> 'kept' then files.status
                    when drops.path is not null then drops.reason
                    else '' end as reason
            from files
            left join packed on files.source = packed.source and files.path = packed.path
            left join drops on files.source = drops.source and files.path = drops.path
            left join kept on files.source = kept.source and files.path = kept.path
            left join planned_keys on files.key = planned_keys.key)
        select source, outcome, stage, reason, is_listed, count(*) as num_files,
            cast(coalesce(sum(num_bytes), 0) as bigint) as num_bytes
        from judged where is_listed or outcome = 'packed'
        group by all order by all
        """
