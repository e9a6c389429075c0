"""Write planned chunks as webdataset shards: `python -m sharding pack DATASET.toml`.

The unit of work is a chunk; a killed pack goes on at the first unfinished shard and ends with the same bytes.
Tars are written anew only when their keys, their order or the way pixels are written changed. New captions go into
a new index (minutes), and into the tars by `rewrite_shards`. Chunks that a run has trained keep their tars.
`pack_shard` does the pixels, `chunk` the format.
"""

import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import CHUNK_JSON, Chunk, captions_digest, commit_chunk, is_sealed, open_chunk, remove_unnamed
from sharding.config import DatasetConfig
from sharding.files import digest_of, require_free_bytes, write_bytes
from sharding.pack_shard import BUILDING, FinishedShard, ImagePolicy, ShardTask, drop_row, pack_shard
from sharding.plan import chunk_name
from sharding.runlog import EventLog, Progress
from sharding.schema import CAPTIONS, DROPS, MANIFEST, PLAN, SCHEMA_VERSION, Workspace
from sharding.tables import list_parts, owned_parts, part_metadata, read_part, read_parts, write_part

logger = logging.getLogger(__name__)

_ROWS_PER_PASS = 120_000
"""Samples whose records and captions are in memory at once, about 5 kB each."""
_BYTES_PER_MEMBERS = 6_000
"""Tar headers, padding, KEY.json and KEY.txt of a sample, for the forecast."""
_JPEG_BYTES_PER_PIXEL = 0.8
"""Quality 95, 4:4:4, of drawn pictures; for the forecast of what has to be encoded anew."""
_MIN_SAMPLES_TO_JUDGE = 20
"""A shorter chunk is judged as if it held this many: one broken file of two is no reason to stop."""
_CHECKED = ".checked"
"""Hidden file of a chunk: digest of the tables at the time it was last found current."""
_RECORD_COLUMNS = [name for name in MANIFEST.names if name not in ("dataset", "phash", "status", "detail", "mode")]


class BrokenFractionError(ValueError):
    """More samples than max_broken_fraction turned out unusable."""


@dataclass(frozen=True)
class PackReport:
    """What packing did, or with dry_run would do, in the chunks that this task owns."""

    packed: tuple[str, ...] = ()
    """Chunks whose tars were written."""
    recaptioned: tuple[str, ...] = ()
    """Chunks whose index was renewed, tars untouched."""
    num_current: int = 0
    sealed: tuple[str, ...] = ()
    """Chunks whose plan changed although a run has trained them; left as they are."""
    not_packed: tuple[str, ...] = ()
    """Chunks that need tars, which `captions_only` does not write."""
    not_planned: tuple[str, ...] = ()
    """Committed chunks that the plan does not know."""
    num_samples: int = 0
    """In `packed`."""
    num_dropped: int = 0
    """In `packed`; each has a row in pack_drops/."""
    forecast_bytes: int = 0
    """Upper estimate of what `packed` takes on disk."""
    is_dry_run: bool = False

    def summary(self) -> str:
        """Return what was done, one line per kind."""
        verb = "would be packed" if self.is_dry_run else "packed"
        size = f", about {self.forecast_bytes / 1e9:,.2f} GB" if self.is_dry_run and self.packed else ""
        lines = [
            f"{len(self.packed):,} chunks {verb} ({self.num_samples:,} samples{size}), {self.num_current:,} current"
        ]
        if self.recaptioned:
            lines.append(f"{len(self.recaptioned):,} chunks {'would get' if self.is_dry_run else 'got'} new captions")
        if self.num_dropped:
            lines.append(f"{self.num_dropped:,} samples dropped while packing; see pack_drops/ or `report`")
        for names, what in (
            (self.not_packed, "have no current tars; run pack without --captions-only"),
            (self.sealed, "changed in the plan after a run trained them and were left as they are"),
            (self.not_planned, "are not in the plan any more; delete them if no run needs them"),
        ):
            if names:
                lines.append(f"{len(names):,} chunks {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    """A planned chunk that is not known to be current. num_bytes: forecast of its tars."""

    name: str
    folder: Path
    plan: pa.Table
    shards_from: str
    num_bytes: int
    old: Chunk | None
    needs_tars: bool
    records: pa.Table = field(default_factory=lambda: pa.table({}))
    """Kept record + plan + caption of each key that is still kept, in training order."""


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
    policy = config.pack.policy
    tables_digest = _tables_digest(config, workspace)
    jobs, num_current, sealed, not_planned = _owned_jobs(
        config, workspace, part_index, num_parts, tables_digest, rewrite_shards=rewrite_shards
    )
    not_packed = [job.name for job in jobs if job.needs_tars and captions_only]
    jobs = [job for job in jobs if not (job.needs_tars and captions_only)]
    _require_captions(workspace, policy, jobs)
    forecast_bytes = sum(job.num_bytes for job in jobs if job.needs_tars)
    if not dry_run:
        require_free_bytes(workspace.chunks, forecast_bytes, "packing")
    roots = _source_roots(config, jobs)

    events = EventLog(workspace.events, stage="pack")
    packed: list[str] = []
    recaptioned: list[str] = []
    num_samples = num_dropped = 0
    total = sum(job.plan.num_rows for job in jobs)
    with _pool(workers) as pool, Progress(total, unit="img", title="pack") as progress:
        for group in _groups(jobs):
            for job in _with_records(workspace, policy, group):
                made_from = _made_from(job, config)
                rewrites = job.needs_tars or (rewrite_shards and job.old is not None and _has_old_captions(job))
                if not rewrites and job.old is not None and job.old.info.made_from == made_from:
                    num_current += 1
                elif dry_run:
                    (packed if rewrites else recaptioned).append(job.name)
                    num_samples += job.records.num_rows if rewrites else 0
                elif rewrites:
                    chunk = _pack_chunk(job, config, workspace, roots=roots, pool=pool, made_from=made_from)
                    packed.append(job.name)
                    num_samples += chunk.info.num_samples
                    num_dropped += chunk.info.num_dropped
                    events.write("chunk_packed", chunk=job.name, samples=chunk.info.num_samples,
                                 dropped=chunk.info.num_dropped)  # fmt: skip
                    logger.info("%s packed: %s samples, %s dropped", job.name, f"{chunk.info.num_samples:,}",
                                f"{chunk.info.num_dropped:,}")  # fmt: skip
                else:
                    _recaption(job, policy=policy, made_from=made_from)
                    recaptioned.append(job.name)
                    events.write("chunk_recaptioned", chunk=job.name, policy=policy)
                    logger.info("%s has new captions", job.name)
                if not dry_run:
                    write_bytes(job.folder / _CHECKED, f"{tables_digest}\n".encode())
                progress.advance(job.plan.num_rows)
    return PackReport(
        packed=tuple(packed),
        recaptioned=tuple(recaptioned),
        num_current=num_current,
        sealed=tuple(sealed),
        not_packed=tuple(not_packed),
        not_planned=tuple(not_planned),
        num_samples=num_samples,
        num_dropped=num_dropped,
        forecast_bytes=forecast_bytes,
        is_dry_run=dry_run,
    )


# --- what is to be done ---


def _tables_digest(config: DatasetConfig, workspace: Workspace) -> str:
    """Digest of all tables that chunks are made from: while it stands, a checked chunk needs no second look."""
    folders = [workspace.plan, workspace.kept, workspace.captions(config.pack.policy)]
    parts = [[p.name, part_metadata(p).get("made_from"), p.stat().st_size] for f in folders for p in list_parts(f)]
    return digest_of([parts, _pixel_settings(config), config.pack.policy])


def _pixel_settings(config: DatasetConfig) -> dict[str, Any]:
    return {
        "shard_size": config.pack.shard_size,
        "jpeg_quality": config.pack.jpeg_quality,
        "lossless_as_png": config.pack.lossless_as_png,
        "schema_version": SCHEMA_VERSION,
    }


def _owned_jobs(
    config: DatasetConfig,
    workspace: Workspace,
    part_index: int,
    num_parts: int,
    tables_digest: str,
    *,
    rewrite_shards: bool,
) -> tuple[list[_Job], int, list[str], list[str]]:
    """Return what may have to be done, the number of chunks known to be current, the sealed and the unplanned ones."""
    if not list_parts(workspace.plan):
        raise FileNotFoundError(f"{workspace.plan}: no plan; run `python -m sharding plan` first")
    plan = read_parts(workspace.plan, schema=PLAN)
    spans = _spans(plan)
    folders = {workspace.chunks / name: span for name, span in spans.items()}
    owned = owned_parts(sorted(folders), part_index, num_parts)
    not_planned = [
        f"{path.parent.parent.name}/{path.parent.name}"
        for path in sorted(workspace.chunks.glob(f"*/*/{CHUNK_JSON}"))
        if path.parent not in folders and path.parent.parent.name != config.combine.name
    ]
    num_current = 0
    waiting: list[tuple[Path, Chunk | None]] = []
    for folder in owned:
        old = open_chunk(folder) if (folder / CHUNK_JSON).exists() else None
        if old is not None and not rewrite_shards and _read_checked(folder) == tables_digest:
            num_current += 1
        else:
            waiting.append((folder, old))
    sizes = _kept_sizes(workspace, [plan.slice(*folders[folder]) for folder, _ in waiting])
    jobs, sealed = [], []
    for folder, old in waiting:
        name = f"{folder.parent.name}/{folder.name}"
        rows = plan.slice(*folders[folder])
        at = pc.index_in(rows.column("key"), value_set=sizes.column("key").combine_chunks())
        is_kept = pc.is_valid(at)
        num_bytes = int(pc.sum(sizes.column("num_bytes").take(at.drop_null())).as_py() or 0)
        shards_from = digest_of([rows.column("key").to_pylist(), is_kept.to_pylist(), _pixel_settings(config)])
        needs_tars = old is None or old.info.shards_from != shards_from
        if needs_tars and old is not None and is_sealed(folder):
            sealed.append(name)
            continue
        jobs.append(_Job(name, folder, rows, shards_from, num_bytes, old, needs_tars))
    return jobs, num_current, sealed, not_planned


def _read_checked(folder: Path) -> str:
    path = folder / _CHECKED
    return path.read_text().strip() if path.exists() else ""


def _spans(plan: pa.Table) -> dict[str, tuple[int, int]]:
    """Return chunk name → (first row, rows) in the plan, which is sorted by dataset, chunk and position."""
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    encoded = plan.select(["dataset", "chunk"]).group_by(["dataset", "chunk"], use_threads=False)
    for row in (
        encoded.aggregate([([], "count_all")]).sort_by([("dataset", "ascending"), ("chunk", "ascending")]).to_pylist()
    ):
        spans[chunk_name(row["dataset"], row["chunk"])] = (start, row["count_all"])
        start += row["count_all"]
    return spans


def _kept_sizes(workspace: Workspace, plans: Sequence[pa.Table]) -> pa.Table:
    """Return key and forecast bytes of every planned key that is kept; only narrow columns are read."""
    schema = pa.schema([("key", pa.string()), ("num_bytes", pa.int64())])
    if not plans:
        return schema.empty_table()
    wanted = pa.concat_tables(plans).column("key").combine_chunks()
    tables = [schema.empty_table()]
    for part in list_parts(workspace.kept):
        kept = read_part(part, ["key", "num_bytes", "width", "height", "is_pass_through"])
        kept = kept.filter(pc.is_in(kept.column("key"), value_set=wanted))
        pixels = pc.multiply(kept.column("width").cast(pa.int64()), kept.column("height").cast(pa.int64()))
        encoded = pc.cast(pc.multiply(pixels, _JPEG_BYTES_PER_PIXEL), pa.int64(), safe=False)
        image = pc.if_else(kept.column("is_pass_through"), kept.column("num_bytes"), encoded)
        tables.append(pa.table([kept.column("key"), pc.add(image, _BYTES_PER_MEMBERS)], schema=schema))
    return pa.concat_tables(tables)


def _require_captions(workspace: Workspace, policy: str, jobs: Sequence[_Job]) -> None:
    """Refuse before the first byte when a planned key that is kept has no caption."""
    if not jobs:
        return
    wanted = pa.concat_tables([job.plan for job in jobs]).column("key").combine_chunks()
    has_caption = [read_part(part, ["key"]).column("key") for part in list_parts(workspace.captions(policy))]
    kept = [read_part(part, ["key"]).column("key") for part in list_parts(workspace.kept)]
    strings = pa.chunked_array([chunk for column in kept for chunk in column.chunks], pa.string())
    wanted = wanted.filter(pc.is_in(wanted, value_set=strings.combine_chunks()))
    captioned = pa.chunked_array([chunk for column in has_caption for chunk in column.chunks], pa.string())
    missing = wanted.filter(pc.invert(pc.is_in(wanted, value_set=captioned.combine_chunks())))
    if len(missing):
        raise ValueError(
            f"captions/{policy}: {len(missing):,} of {len(wanted):,} keys have no caption, first {missing[0].as_py()}; "
            "run `python -m captioning compose` first"
        )


def _source_roots(config: DatasetConfig, jobs: Sequence[_Job]) -> dict[str, Path]:
    roots = {name: source.root for name, source in config.sources.items()}
    if any(job.needs_tars for job in jobs):
        for name, root in roots.items():
            if not root.is_dir():
                raise FileNotFoundError(f"sources.{name}.root: {root} is not a folder; mount it or correct the config")
    return roots


def _groups(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    group: list[_Job] = []
    num_rows = 0
    for job in jobs:
        if group and num_rows + job.plan.num_rows > _ROWS_PER_PASS:
            yield group
            group, num_rows = [], 0
        group.append(job)
        num_rows += job.plan.num_rows
    if group:
        yield group


def _with_records(workspace: Workspace, policy: str, jobs: Sequence[_Job]) -> list[_Job]:
    """Join plan, kept records and captions of some chunks in one pass over the parts."""
    wanted = pa.concat_tables([job.plan for job in jobs]).column("key").combine_chunks()
    kept = _select(workspace.kept, wanted, pa.schema([MANIFEST.field(name) for name in _RECORD_COLUMNS]))
    captions = _select(workspace.captions(policy), wanted, CAPTIONS)
    joined = []
    for job in jobs:
        at = pc.index_in(job.plan.column("key"), value_set=kept.column("key").combine_chunks())
        plan = job.plan.filter(pc.is_valid(at))
        records = kept.take(at.drop_null())
        texts = captions.take(pc.index_in(plan.column("key"), value_set=captions.column("key").combine_chunks()))
        for name in ("dataset", "period", "repeats", "loss_weight"):
            records = records.append_column(name, plan.column(name))
        for name in ("text", "groups"):
            records = records.append_column(name, texts.column(name))
        joined.append(replace(job, records=records))
    return joined


def _select(folder: Path, keys: pa.Array, schema: pa.Schema) -> pa.Table:
    tables = [schema.empty_table()]
    for part in list_parts(folder):
        table = read_part(part, schema.names)
        tables.append(table.filter(pc.is_in(table.column("key"), value_set=keys)).cast(schema))
    return pa.concat_tables(tables)


def _made_from(job: _Job, config: DatasetConfig) -> str:
    columns = job.records.select(["key", "sha256", "period", "repeats", "loss_weight", "text", "groups"])
    return digest_of([job.shards_from, config.pack.policy, columns.to_pylist()])


def _has_old_captions(job: _Job) -> bool:
    """Tell whether KEY.txt in the tars differs from today's captions; keys that were dropped have none."""
    assert job.old is not None
    packed = job.old.read_index().column("key")
    at = pc.index_in(packed, value_set=job.records.column("key").combine_chunks())
    rows = job.records.take(at.drop_null())
    return job.old.info.shard_captions != captions_digest(
        rows.column("key").to_pylist(), rows.column("text").to_pylist()
    )


# --- doing it ---


def _pack_chunk(
    job: _Job,
    config: DatasetConfig,
    workspace: Workspace,
    *,
    roots: dict[str, Path],
    pool: ProcessPoolExecutor | None,
    made_from: str,
) -> Chunk:
    images = ImagePolicy(config.pack.jpeg_quality, config.pack.lossless_as_png, config.filters.max_pixels)
    size = config.pack.shard_size
    tasks = [
        ShardTask(job.folder, number, job.records.slice(start, size).combine_chunks(), roots, images)
        for number, start in enumerate(range(0, job.records.num_rows, size))
    ]
    finished = list(pool.map(pack_shard, tasks) if pool is not None else map(pack_shard, tasks))
    shards = [one.shard for one in finished if one.shard is not None]
    drops = pa.concat_tables([DROPS.empty_table(), *(one.drops for one in finished)])
    if drops.num_rows > config.max_broken_fraction * max(job.records.num_rows, _MIN_SAMPLES_TO_JUDGE):
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
    drops_path = workspace.pack_drops / f"{job.name.replace('/', '-')}.parquet"
    if drops.num_rows:
        write_part(drops_path, drops, made_from=made_from)
    chunk = commit_chunk(
        job.folder,
        rows,
        name=job.name,
        shards=shards,
        policy=config.pack.policy,
        shard_policy=config.pack.policy,
        made_from=made_from,
        seed=config.plan.seed,
        num_dropped=drops.num_rows,
        shards_from=job.shards_from,
        shard_captions=captions_digest(rows.column("key").to_pylist(), rows.column("caption").to_pylist()),
    )
    if not drops.num_rows:
        drops_path.unlink(missing_ok=True)
    shutil.rmtree(job.folder / BUILDING, ignore_errors=True)
    if not is_sealed(job.folder):  # a run that trained it may still read the old tars
        remove_unnamed(chunk)
    return chunk


def _discard(job: _Job, finished: Iterable[FinishedShard]) -> None:
    named = {shard.path for shard in job.old.info.shards} if job.old is not None else set()
    for one in finished:
        if one.shard is not None and one.shard.path not in named:
            (job.folder / one.shard.path).unlink(missing_ok=True)
    shutil.rmtree(job.folder / BUILDING, ignore_errors=True)


def _vanished_drops(job: _Job) -> pa.Table:
    keys = job.plan.column("key")
    is_gone = pc.invert(pc.is_in(keys, value_set=job.records.column("key").combine_chunks()))
    rows = [
        drop_row(key, "", "", "not_kept_any_more", f"planned in {job.name}, but dedupe does not keep it now")
        for key in keys.filter(is_gone).to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=DROPS)


def _recaption(job: _Job, *, policy: str, made_from: str) -> Chunk:
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
        num_dropped=info.num_dropped,
        shards_from=info.shards_from,
        shard_captions=info.shard_captions,
    )
    if not is_sealed(job.folder):
        remove_unnamed(chunk)
    return chunk


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers <= 0:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        yield pool


def _end_with_parent() -> None:
    """End this worker when its parent is killed; without this it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = parent

        def wait() -> None:
            watch.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
