"""Write planned chunks as webdataset shards: `python -m sharding pack DATASET.toml`.

The unit of work is a chunk; a killed pack goes on at the first unfinished shard and ends with the same bytes.
Tars are written anew only when their keys, their order or the way pixels are written changed. New captions go into
a new index (minutes), and into the tars by `rewrite_shards`. Chunks that a run has trained keep their tars.
`pack_shard` does the pixels, `chunk` the format.
"""

import logging
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import Chunk, captions_digest, commit_chunk, is_sealed, remove_unnamed
from sharding.config import DatasetConfig
from sharding.files import LEFT_OVER_SECONDS, free_bytes, locked, remove_temporaries, require_free_bytes
from sharding.images import BrokenFractionError, is_too_broken
from sharding.packing.jobs import (
    Job,
    find_work,
    has_old_captions,
    image_policy,
    job_digest,
    look_again,
    mark_checked,
    mask_folders,
    require_captions,
    tables_digest,
)
from sharding.packing.report import PackReport
from sharding.packing.rows import jobs_with_rows
from sharding.packing.shard import BUILDING, FinishedShard, ShardTask, pack_shard
from sharding.packing.stored_image import UNREAD_BY
from sharding.runlog import EventLog, Progress
from sharding.scanning.listing import check_roots
from sharding.schema import DROPS, Workspace, drop_row
from sharding.tables import write_part
from sharding.workers import open_pool

logger = logging.getLogger(__name__)


def pack(
    config: DatasetConfig,
    workspace: Workspace,
    *,
    workers: int = 0,
    part_index: int = 0,
    num_parts: int = 1,
    captions_only: bool = False,
    rewrite_shards: bool = False,
    dry_run: bool = False,
) -> PackReport:
    """Bring every planned chunk that this task owns up to date.

    workers: processes that write shards; 0 works in this process. part_index, num_parts: of the chunks sorted by
    name, every num_parts-th belongs to this task. captions_only: no tar is written. rewrite_shards: tars whose
    KEY.txt or KEY.json are older than the captions are written anew, too.

    Raises ValueError when captions are missing, FileNotFoundError when the plan or a source folder is,
    DiskFullError when the forecast does not fit, BrokenFractionError when a chunk holds too many unusable files
    (nothing of that chunk is committed).
    """
    if captions_only and rewrite_shards:
        raise ValueError("--captions-only and --rewrite-shards exclude each other")
    digest = tables_digest(config, workspace)
    work = find_work(
        config, workspace, part_index=part_index, num_parts=num_parts, digest=digest, rewrite_shards=rewrite_shards
    )
    jobs = [job for job in work.jobs if not (job.needs_tars and captions_only)]
    require_captions(workspace, config.pack.policy, jobs)
    if any(job.needs_tars for job in jobs):
        _check_folders(config)
    report = PackReport(
        num_current=work.num_current,
        sealed=work.sealed,
        not_packed=tuple(job.name for job in work.jobs if job.needs_tars and captions_only),
        not_planned=work.not_planned,
        forecast_bytes=sum(job.num_bytes for job in jobs if job.needs_tars or rewrite_shards),
        free_bytes=free_bytes(workspace.chunks),
        unread_by=tuple(f"{name} goes in unchanged: not read by {UNREAD_BY[name]}"
                        for name in config.pack.pass_through_formats),
        is_dry_run=dry_run,
    )  # fmt: skip
    if not dry_run:
        require_free_bytes(workspace.chunks, report.forecast_bytes, "packing")
        remove_temporaries(workspace.pack_drops, min_age_seconds=LEFT_OVER_SECONDS)
    total = sum(job.plan.num_rows for job in jobs)
    with open_pool(workers) as pool, Progress(total, unit="img", title="pack") as progress:
        for job in jobs_with_rows(workspace, config.pack.policy, jobs):
            with locked(job.folder, dry_run=dry_run):
                job = look_again(job)  # another task may have finished it while this one waited
                report = _bring_up_to_date(job, config, workspace, report, pool=pool, rewrite_shards=rewrite_shards)
                if not dry_run:
                    mark_checked(job.folder, digest)
            progress.advance(job.plan.num_rows)
    return report


def _check_folders(config: DatasetConfig) -> None:
    check_roots({name: source.root for name, source in config.sources.items()})
    for name, folder in mask_folders(config).items():
        if not folder.is_dir():
            raise FileNotFoundError(f"sources.{name}.masks: {folder} is no folder; create it or leave the setting out")


def _bring_up_to_date(
    job: Job,
    config: DatasetConfig,
    workspace: Workspace,
    report: PackReport,
    *,
    pool: ProcessPoolExecutor | None,
    rewrite_shards: bool,
) -> PackReport:
    """Write what a chunk lacks, unless it is a dry run, and return the report with it."""
    made_from = job_digest(job, config)
    rewrites = job.needs_tars or (rewrite_shards and job.old is not None and has_old_captions(job))
    events = EventLog(workspace.events, stage="pack")
    if not rewrites and job.old is not None and job.old.info.made_from == made_from:
        if not report.is_dry_run:
            _clean_up(job.old, drops_path(workspace, job.name))
        return replace(report, num_current=report.num_current + 1)
    if not rewrites:
        if not report.is_dry_run:
            _recaption(job, policy=config.pack.policy, made_from=made_from)
            events.write("chunk_recaptioned", chunk=job.name, policy=config.pack.policy)
            logger.info("%s has new captions", job.name)
        return replace(report, recaptioned=(*report.recaptioned, job.name))
    num_samples, num_dropped = job.records.num_rows, 0
    if not report.is_dry_run:
        info = pack_chunk(job, config, workspace, pool=pool, made_from=made_from).info
        num_samples, num_dropped = info.num_samples, info.num_dropped
        events.write("chunk_packed", chunk=job.name, samples=num_samples, dropped=num_dropped)
        logger.info("%s packed: %s samples, %s dropped", job.name, f"{num_samples:,}", f"{num_dropped:,}")
    return replace(
        report,
        packed=(*report.packed, job.name),
        num_samples=report.num_samples + num_samples,
        num_dropped=report.num_dropped + num_dropped,
    )


def shard_tasks(job: Job, config: DatasetConfig) -> list[ShardTask]:
    """Return the shards of a job with records, in order."""
    roots = {name: source.root for name, source in config.sources.items()}
    masks = {name: source.masks for name, source in config.sources.items() if source.masks is not None}
    size = config.pack.shard_size
    return [
        ShardTask(
            job.folder, number, job.records.slice(start, size).combine_chunks(), roots, image_policy(config), masks,
            config.pack.bad_masks,
        )
        for number, start in enumerate(range(0, job.records.num_rows, size))
    ]  # fmt: skip


def pack_chunk(
    job: Job,
    config: DatasetConfig,
    workspace: Workspace,
    *,
    pool: ProcessPoolExecutor | None,
    made_from: str,
) -> Chunk:
    """Write the tars of a job with records, then commit the chunk."""
    tasks = shard_tasks(job, config)
    finished = list(pool.map(pack_shard, tasks) if pool is not None else map(pack_shard, tasks))
    shards = [one.shard for one in finished if one.shard is not None]
    drops = pa.concat_tables([DROPS.empty_table(), *(one.drops for one in finished)])
    if is_too_broken(drops.num_rows, job.records.num_rows, max_broken_fraction=config.max_broken_fraction):
        _discard(job, finished)
        raise BrokenFractionError(
            f"chunk {job.name}: {drops.num_rows:,} of {job.records.num_rows:,} samples are unusable, more than "
            f"max_broken_fraction = {config.max_broken_fraction}; first: {drops['source'][0]}/{drops['path'][0]}: "
            f"{drops['reason'][0]}: {drops['detail'][0]}; run scan again if files changed on purpose"
        )
    drops = pa.concat_tables([drops, _vanished_drops(job)])
    rows = pa.concat_tables([one.rows for one in finished]) if finished else None
    if rows is None or not rows.num_rows:
        raise BrokenFractionError(f"chunk {job.name}: none of its {job.plan.num_rows:,} planned samples is left")
    path = drops_path(workspace, job.name)
    if drops.num_rows:
        write_part(path, drops, made_from=made_from)
    chunk = commit_chunk(
        job.folder,
        rows,
        name=job.name,
        shards=shards,
        policy=config.pack.policy,
        shard_policy=config.pack.policy,
        made_from=made_from,
        seed=config.plan.seed,
        is_held_out=job.is_held_out,
        num_dropped=drops.num_rows,
        shards_from=job.shards_from,
        shard_captions=captions_digest(rows.column("key").to_pylist(), rows.column("caption").to_pylist()),
    )
    _clean_up(chunk, path)
    return chunk


def drops_path(workspace: Workspace, name: str) -> Path:
    """Return where the drops of a chunk are written."""
    return workspace.pack_drops / f"{name.replace('/', '-')}.parquet"


def _clean_up(chunk: Chunk, drops_path: Path) -> None:
    """Remove what a committed chunk does not need; also asked for later, when a kill came right after the commit."""
    if not chunk.info.num_dropped:
        drops_path.unlink(missing_ok=True)
    shutil.rmtree(chunk.folder / BUILDING, ignore_errors=True)
    if not is_sealed(chunk.folder):  # a run that trained it may still read the old tars
        remove_unnamed(chunk)


def _discard(job: Job, finished: Iterable[FinishedShard]) -> None:
    named = {shard.path for shard in job.old.info.shards} if job.old is not None else set()
    for one in finished:
        if one.shard is not None and one.shard.path not in named:
            (job.folder / one.shard.path).unlink(missing_ok=True)
    shutil.rmtree(job.folder / BUILDING, ignore_errors=True)


def _vanished_drops(job: Job) -> pa.Table:
    keys = job.plan.column("key")
    is_gone = pc.invert(pc.is_in(keys, value_set=job.records.column("key").combine_chunks()))
    rows = [
        drop_row(
            {"key": key, "source": "", "path": ""},
            stage="pack",
            reason="not_kept_any_more",
            detail=f"planned in {job.name}, but dedupe does not keep it now",
        )
        for key in keys.filter(is_gone).to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=DROPS)


def _recaption(job: Job, *, policy: str, made_from: str) -> Chunk:
    """Commit a new index with today's captions over the same tars."""
    assert job.old is not None
    info = job.old.info
    index = job.old.read_index()
    at = pc.index_in(index.column("key"), value_set=job.records.column("key").combine_chunks())
    records = job.records.take(at)
    for name, source in (
        ("caption", "text"), ("groups", "groups"), ("dataset", "dataset"), ("period", "period"),
        ("repeats", "repeats"), ("loss_weight", "loss_weight"),
    ):  # fmt: skip
        index = index.set_column(index.schema.get_field_index(name), name, records.column(source))
    chunk = commit_chunk(
        job.folder,
        index,
        name=job.name,
        shards=info.shards,
        policy=policy,
        shard_policy=info.shard_policy,
        made_from=made_from,
        seed=info.seed,
        is_held_out=info.is_held_out,
        num_dropped=info.num_dropped,
        shards_from=info.shards_from,
        shard_captions=info.shard_captions,
    )
    if not is_sealed(job.folder):
        remove_unnamed(chunk)
    return chunk
