"""What there is to pack: the chunks that are planned but not known to be current, and what they are made of.

Reads tables, masks and chunk.json files; writes nothing but the note that a chunk was found current. `pack` decides
what to do about each job and does it; `pack_rows` joins the rows of the jobs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import (
    CHUNK_JSON,
    Chunk,
    captions_digest,
    chunk_folders,
    chunk_name,
    chunk_number,
    damaged_files,
    is_sealed,
    name_of,
    open_chunk,
)
from sharding.config import DatasetConfig
from sharding.files import digest_of, write_bytes
from sharding.keys import key_numbers
from sharding.packing.stored_image import ImagePolicy, mask_path
from sharding.planning.order import KeyRows
from sharding.schema import HELD_OUT, PLAN, SCHEMA_VERSION, Workspace
from sharding.tables import list_parts, owned_parts, part_metadata, read_part, read_parts

_BYTES_PER_MEMBERS = 6_000
"""Tar headers, padding, KEY.json and KEY.txt of a sample, for the forecast."""
_JPEG_BYTES_PER_PIXEL = 0.8
"""Quality 95, 4:4:4, of drawn pictures; for the forecast of what has to be encoded anew."""
_CHECKED = ".checked"
"""Hidden file of a chunk: digest of the tables at the time it was last found current."""


@dataclass(frozen=True)
class Job:
    """A planned chunk that is not known to be current. num_bytes: forecast of its tars."""

    name: str
    folder: Path
    plan: pa.Table
    is_kept: np.ndarray[Any, Any]
    """Of each row of plan: dedupe still keeps it."""
    masks: list[str]
    """Of each row: SHA-256 of its mask file, or ""; empty when no source has a folder of masks."""
    shards_from: str
    num_bytes: int
    old: Chunk | None
    needs_tars: bool
    records: pa.Table = field(default_factory=lambda: pa.table({}))
    """Kept record + plan + caption of each key that is still kept, in training order."""

    @property
    def is_held_out(self) -> bool:
        return chunk_number(self.folder) == HELD_OUT


@dataclass(frozen=True)
class Work:
    """What the chunks of one task need. sealed, not_planned: names, see pack.PackReport."""

    jobs: tuple[Job, ...]
    num_current: int
    sealed: tuple[str, ...]
    not_planned: tuple[str, ...]


def image_policy(config: DatasetConfig) -> ImagePolicy:
    """Return how pixels are written."""
    pack, filters = config.pack, config.filters
    return ImagePolicy(
        jpeg_quality=pack.jpeg_quality,
        lossless_as_png=pack.lossless_as_png,
        reencode=pack.reencode,
        max_pixels=pack.max_pixels,
        pass_through_formats=pack.pass_through_formats,
        min_source_pixels=filters.min_pixels,
        max_source_pixels=filters.max_pixels,
    )


def tables_digest(config: DatasetConfig, workspace: Workspace) -> str:
    """Digest of all tables that chunks are made from: while it stands, a checked chunk needs no second look."""
    folders = [workspace.plan, workspace.kept, workspace.captions(config.pack.policy)]
    parts = [[p.name, part_metadata(p).get("made_from"), p.stat().st_size] for f in folders for p in list_parts(f)]
    return digest_of([parts, _pixel_settings(config), config.pack.policy])


def _pixel_settings(config: DatasetConfig) -> dict[str, Any]:
    settings = config.pack.model_dump(exclude={"policy"})
    settings["min_pixels"] = config.filters.min_pixels if config.pack.max_pixels else 0
    settings["masks"] = {name: str(source.masks) for name, source in config.sources.items() if source.masks}
    return settings | {"schema_version": SCHEMA_VERSION}


def mask_folders(config: DatasetConfig) -> dict[str, Path]:
    """Return source → its folder of masks."""
    return {name: source.masks for name, source in config.sources.items() if isinstance(source.masks, Path)}


def find_work(
    config: DatasetConfig, workspace: Workspace, *, part_index: int, num_parts: int, digest: str, rewrite_shards: bool
) -> Work:
    """Look at every planned chunk that the task owns. digest: `tables_digest` of today.

    A chunk whose tars are gone or cut is packed again, also when a run has trained it: the same keys give the same
    tars. A trained chunk whose keys changed in the plan is left as it is. Where a source has a folder of masks, every
    chunk is looked at and every mask hashed: no table says whether they have changed.
    """
    if not list_parts(workspace.plan):
        raise FileNotFoundError(f"{workspace.plan}: no plan; run `python -m sharding plan` first")
    plan = read_parts(workspace.plan, schema=PLAN)
    folders = planned_chunks(plan, workspace.chunks)
    owned = owned_parts(sorted(folders), part_index, num_parts)
    not_planned = [
        name_of(folder)
        for folder in chunk_folders(workspace.chunks)
        if folder not in folders and folder.parent.name != config.combine.name
    ]
    may_skip = not rewrite_shards and not mask_folders(config)
    num_current = 0
    waiting: list[tuple[Path, Chunk | None, bool]] = []
    for folder in owned:
        old = _committed(folder)
        is_whole = old is not None and not damaged_files(old)
        if is_whole and may_skip and _read_checked(folder) == digest:
            num_current += 1
        else:
            waiting.append((folder, old, is_whole))
    jobs, sealed = [], []
    plans = {folder: folders[folder] for folder, _, _ in waiting}
    for job, (_, old, is_whole) in zip(make_jobs(config, workspace, plans), waiting, strict=True):
        has_changed = old is not None and old.info.shards_from != job.shards_from
        if has_changed and is_sealed(job.folder):
            sealed.append(job.name)
        else:
            jobs.append(replace(job, old=old, needs_tars=has_changed or not is_whole))
    return Work(tuple(jobs), num_current, tuple(sealed), tuple(not_planned))


def look_again(job: Job) -> Job:
    """Return the job as it is now, after waiting for another task that may have brought the same chunk up to date."""
    old = _committed(job.folder)
    is_whole = old is not None and not damaged_files(old)
    has_changed = old is not None and old.info.shards_from != job.shards_from
    return replace(job, old=old, needs_tars=has_changed or not is_whole)


def _committed(folder: Path) -> Chunk | None:
    return open_chunk(folder) if (folder / CHUNK_JSON).exists() else None


def make_jobs(config: DatasetConfig, workspace: Workspace, plans: Mapping[Path, pa.Table]) -> list[Job]:
    """Return the jobs of packing some chunks, given folder → its rows of the plan, as if none had been packed."""
    facts = _kept_facts(config, workspace, list(plans.values()))
    jobs = []
    for (folder, rows), (is_kept, num_bytes, masks) in zip(plans.items(), facts, strict=True):
        made_from = [rows.column("key").to_pylist(), is_kept.tolist(), _pixel_settings(config), masks]
        jobs.append(
            Job(
                name_of(folder), folder, rows, is_kept, masks, digest_of(made_from), int(num_bytes[is_kept].sum()),
                old=None, needs_tars=True,
            )
        )  # fmt: skip
    return jobs


def planned_chunks(plan: pa.Table, chunks: Path) -> dict[Path, pa.Table]:
    """Return the folder of each planned chunk and its rows of the plan."""
    return {chunks / name: plan.slice(*span) for name, span in _spans(plan).items()}


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


def _kept_facts(
    config: DatasetConfig, workspace: Workspace, plans: Sequence[pa.Table]
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]]:
    """Return for each plan, row by row: is kept, forecast bytes, digest of the mask. One pass over narrow columns."""
    keys = np.concatenate([np.empty(0, np.uint64), *(key_numbers(plan.column("key")) for plan in plans)])
    finder = KeyRows(keys)
    is_kept, num_bytes = np.zeros(len(keys), dtype=bool), np.zeros(len(keys), dtype=np.int64)
    folders = mask_folders(config)
    masks = [""] * len(keys) if folders else []
    columns = ["key", "num_bytes", "width", "height", "is_pass_through", *(["source", "path"] if folders else [])]
    for part in list_parts(workspace.kept) if len(keys) else ():
        kept = read_part(part, columns)
        rows = finder.of(key_numbers(kept.column("key")))
        kept, rows = kept.filter(pa.array(rows >= 0)), rows[rows >= 0]
        is_kept[rows] = True
        num_bytes[rows] = _forecast(config, kept)
        for row, source, path in zip(rows.tolist(), *_lists(kept, ["source", "path"]), strict=True) if folders else ():
            if source in folders and (mask := _read_mask(folders[source], path)):
                masks[row] = hashlib.sha256(mask).hexdigest()
                num_bytes[row] += len(mask) + 1_024
    bounds = np.cumsum([0, *(plan.num_rows for plan in plans)]).tolist()
    return [(is_kept[a:b], num_bytes[a:b], masks[a:b]) for a, b in pairwise(bounds)]


def _forecast(config: DatasetConfig, kept: pa.Table) -> np.ndarray[Any, Any]:
    """Return an upper estimate of the bytes that each sample takes in a tar."""
    widths, heights, sizes = (kept.column(name).to_numpy() for name in ("width", "height", "num_bytes"))
    pixels = widths.astype(np.int64) * heights
    encoded = (pixels * _JPEG_BYTES_PER_PIXEL).astype(np.int64)
    passes = kept.column("is_pass_through").to_numpy() & (config.pack.reencode == "needed")
    if cap := config.pack.max_pixels:
        encoded = (np.minimum(pixels, cap) * _JPEG_BYTES_PER_PIXEL).astype(np.int64)
        passes &= pixels <= cap
    estimate: np.ndarray[Any, Any] = np.where(passes, sizes, encoded) + _BYTES_PER_MEMBERS
    return estimate


def _lists(table: pa.Table, names: Sequence[str]) -> list[list[str]]:
    return [table.column(name).to_pylist() for name in names]


def _read_mask(folder: Path, path: str) -> bytes:
    try:
        return mask_path(folder, path).read_bytes()
    except OSError:
        return b""  # none, or one that `pack_shard` will name


def require_captions(workspace: Workspace, policy: str, jobs: Sequence[Job]) -> None:
    """Refuse before the first byte when a planned key that is kept has no caption."""
    if not jobs:
        return
    keys = np.concatenate([key_numbers(job.plan.column("key"))[job.is_kept] for job in jobs])
    finder = KeyRows(keys)
    has_caption = np.zeros(len(keys), dtype=bool)
    for part in list_parts(workspace.captions(policy)):
        rows = finder.of(key_numbers(read_part(part, ["key"]).column("key")))
        has_caption[rows[rows >= 0]] = True
    missing = keys[~has_caption]
    if len(missing):
        raise ValueError(
            f"captions/{policy}: {len(missing):,} of {len(keys):,} keys have no caption, first {int(missing[0]):016x}; "
            "run `python -m captioning compose` first"
        )


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
