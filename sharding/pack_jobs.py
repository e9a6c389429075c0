"""What there is to pack: the chunks that are planned but not known to be current, and the rows they are made of.

Reads tables and chunk.json files; writes nothing. `pack` decides what to do about each job and does it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import (
    CHUNK_JSON,
    Chunk,
    captions_digest,
    chunk_folders,
    chunk_name,
    damaged_files,
    is_sealed,
    name_of,
    open_chunk,
)
from sharding.config import DatasetConfig
from sharding.files import digest_of, write_bytes
from sharding.schema import CAPTIONS, MANIFEST, PLAN, SCHEMA_VERSION, Workspace
from sharding.tables import list_parts, owned_parts, part_metadata, read_part, read_parts

_ROWS_PER_PASS = 120_000
"""Samples whose records and captions are in memory at once, about 5 kB each."""
_BYTES_PER_MEMBERS = 6_000
"""Tar headers, padding, KEY.json and KEY.txt of a sample, for the forecast."""
_JPEG_BYTES_PER_PIXEL = 0.8
"""Quality 95, 4:4:4, of drawn pictures; for the forecast of what has to be encoded anew."""
_CHECKED = ".checked"
"""Hidden file of a chunk: digest of the tables at the time it was last found current."""
_RECORD_COLUMNS = [name for name in MANIFEST.names if name not in ("dataset", "phash", "status", "detail", "mode")]


@dataclass(frozen=True)
class Job:
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


@dataclass(frozen=True)
class Work:
    """What the chunks of one task need. sealed, not_planned: names, see pack.PackReport."""

    jobs: tuple[Job, ...]
    num_current: int
    sealed: tuple[str, ...]
    not_planned: tuple[str, ...]


def tables_digest(config: DatasetConfig, workspace: Workspace) -> str:
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


def find_work(
    config: DatasetConfig, workspace: Workspace, *, part_index: int, num_parts: int, digest: str, rewrite_shards: bool
) -> Work:
    """Look at every planned chunk that the task owns. digest: `tables_digest` of today.

    A chunk whose tars are gone or cut is packed again, also when a run has trained it: the same keys give the same
    tars. A trained chunk whose keys changed in the plan is left as it is.
    """
    if not list_parts(workspace.plan):
        raise FileNotFoundError(f"{workspace.plan}: no plan; run `python -m sharding plan` first")
    plan = read_parts(workspace.plan, schema=PLAN)
    spans = _spans(plan)
    folders = {workspace.chunks / name: span for name, span in spans.items()}
    owned = owned_parts(sorted(folders), part_index, num_parts)
    not_planned = [
        name_of(folder)
        for folder in chunk_folders(workspace.chunks)
        if folder not in folders and folder.parent.name != config.combine.name
    ]
    num_current = 0
    waiting: list[tuple[Path, Chunk | None, bool]] = []
    for folder in owned:
        old = open_chunk(folder) if (folder / CHUNK_JSON).exists() else None
        is_whole = old is not None and not damaged_files(old)
        if is_whole and not rewrite_shards and _read_checked(folder) == digest:
            num_current += 1
        else:
            waiting.append((folder, old, is_whole))
    sizes = _kept_sizes(workspace, [plan.slice(*folders[folder]) for folder, _, _ in waiting])
    jobs, sealed = [], []
    for folder, old, is_whole in waiting:
        name = name_of(folder)
        rows = plan.slice(*folders[folder])
        at = pc.index_in(rows.column("key"), value_set=sizes.column("key").combine_chunks())
        is_kept = pc.is_valid(at)
        num_bytes = int(pc.sum(sizes.column("num_bytes").take(at.drop_null())).as_py() or 0)
        shards_from = digest_of([rows.column("key").to_pylist(), is_kept.to_pylist(), _pixel_settings(config)])
        has_changed = old is not None and old.info.shards_from != shards_from
        if has_changed and is_sealed(folder):
            sealed.append(name)
            continue
        jobs.append(Job(name, folder, rows, shards_from, num_bytes, old, needs_tars=has_changed or not is_whole))
    return Work(tuple(jobs), num_current, tuple(sealed), tuple(not_planned))


def mark_checked(folder: Path, digest: str) -> None:
    """Note that a chunk is current as long as `tables_digest` is `digest`."""
    write_bytes(folder / _CHECKED, f"{digest}\n".encode())


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


def require_captions(workspace: Workspace, policy: str, jobs: Sequence[Job]) -> None:
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


def groups_of_jobs(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Yield the jobs in groups whose records fit into memory together."""
    group: list[Job] = []
    num_rows = 0
    for job in jobs:
        if group and num_rows + job.plan.num_rows > _ROWS_PER_PASS:
            yield group
            group, num_rows = [], 0
        group.append(job)
        num_rows += job.plan.num_rows
    if group:
        yield group


def with_records(workspace: Workspace, policy: str, jobs: Sequence[Job]) -> list[Job]:
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


def job_digest(job: Job, config: DatasetConfig) -> str:
    """Return the digest of all that index and tars of a job with records depend on."""
    columns = job.records.select(["key", "sha256", "period", "repeats", "loss_weight", "text", "groups"])
    return digest_of([job.shards_from, config.pack.policy, columns.to_pylist()])


def has_old_captions(job: Job) -> bool:
    """Tell whether KEY.txt in the tars differs from today's captions; keys that were dropped have none."""
    assert job.old is not None
    packed = job.old.read_index().column("key")
    at = pc.index_in(packed, value_set=job.records.column("key").combine_chunks())
    rows = job.records.take(at.drop_null())
    return job.old.info.shard_captions != captions_digest(
        rows.column("key").to_pylist(), rows.column("text").to_pylist()
    )
