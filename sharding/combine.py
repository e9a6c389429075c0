"""Mix chunk k of every dataset into combined chunks: `python -m sharding combine DATASET.toml`.

Wave k is chunk k of every dataset that still has one, shuffled and cut into equal chunks
`combined/<wave>-<number>`. A combined chunk is an index that points at shards of other chunks; no pixel is copied
unless `materialize` asks for real tars. A dataset with few chunks is exhausted early, so the mixture drifts with
the waves; the report shows how. Waves that a run has started to train are left as they are.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import (
    Chunk,
    ChunkError,
    Sample,
    ShardFile,
    captions_digest,
    chunk_name,
    commit_chunk,
    damaged_files,
    is_sealed,
    iterate_rows,
    list_chunks,
    remove_unnamed,
    write_shard,
)  # fmt: skip
from sharding.config import DatasetConfig
from sharding.files import digest_of, require_free_bytes
from sharding.runlog import EventLog
from sharding.schema import INDEX, PLAN, Workspace
from sharding.tables import read_parts

logger = logging.getLogger(__name__)

_ROW_COLUMNS = ("width", "height", "groups", "dataset", "period", "repeats", "loss_weight", "sha256")


@dataclass(frozen=True)
class Wave:
    """One wave: what it mixes and what became of it."""

    number: int
    num_samples: dict[str, int]
    """By dataset; a dataset without a chunk of this number is absent."""
    chunks: tuple[str, ...]
    state: str
    """written, current, sealed (trained, left as it is), or waiting for a chunk that is planned but not packed."""
    drift: float
    """Total variation distance between this wave's mixture and wave 0's, 0 to 1."""
    waits_for: tuple[str, ...] = ()

    def fractions(self) -> dict[str, float]:
        """Return each dataset's share of the wave."""
        total = sum(self.num_samples.values())
        return {name: count / total for name, count in self.num_samples.items()}


@dataclass(frozen=True)
class CombineReport:
    """The waves, in order, and what was removed because no wave needs it any more."""

    waves: tuple[Wave, ...]
    removed: tuple[str, ...]
    is_dry_run: bool = False

    def summary(self) -> str:
        """Return one line per wave with its mixture and drift."""
        lines = ["wave   images  chunks  drift  state    mixture"]
        for wave in self.waves:
            mixture = ", ".join(f"{name} {share:.1%}" for name, share in sorted(wave.fractions().items()))
            lines.append(
                f"{wave.number:04d} {sum(wave.num_samples.values()):>8,} {len(wave.chunks):>7,} {wave.drift:>6.1%}  "
                f"{wave.state:<8} {mixture}"
            )
            if wave.waits_for:
                lines.append(f"     waits for {', '.join(wave.waits_for)}: pack first")
        if self.removed:
            lines.append(f"{len(self.removed)} combined chunks are not needed any more: {', '.join(self.removed[:5])}")
        if self.is_dry_run:
            lines.append("nothing was written (--dry-run)")
        return "\n".join(lines)


def combine(
    config: DatasetConfig, workspace: Workspace, *, materialize: bool = False, dry_run: bool = False
) -> CombineReport:
    """Bring the combined chunks of every wave up to date.

    materialize: write real tars of `pack.shard_size` samples instead of pointing at others'.
    A wave with a planned but unpacked chunk is not written but reported as waiting.
    Raises ChunkError when chunks of a wave hold captions of different policies or one key twice, ValueError when a
    dataset has the name of the combined folder.
    """
    combined = config.combine.name
    every = list_chunks(workspace.chunks)
    plain = [chunk for chunk in every if not chunk.info.is_combined]
    if any(chunk.folder.parent.name == combined for chunk in plain):
        raise ValueError(f"combine.name: {combined!r} is also a dataset; choose another name")
    old = {chunk.name: chunk for chunk in every if chunk.folder.parent.name == combined}
    planned = _planned(workspace)
    by_wave: dict[int, list[Chunk]] = {}
    for chunk in plain:
        by_wave.setdefault(int(chunk.folder.name), []).append(chunk)
    if materialize and not dry_run:
        num_bytes = sum(shard.num_bytes for chunk in plain for shard in chunk.info.shards)
        have_bytes = sum(s.num_bytes for c in old.values() for s in c.info.shards if "/" not in s.path)
        require_free_bytes(workspace.chunks, max(0, num_bytes - have_bytes), "materializing the waves")

    waves: list[Wave] = []
    wanted: set[str] = set()
    first_mixture: dict[str, float] = {}
    for number in sorted(by_wave):
        members = by_wave[number]
        wave = _wave(config, number, members, planned, old, first_mixture)
        first_mixture = first_mixture or wave.fractions()
        if wave.state == "written":
            made_from = _made_from(config, members, materialize=materialize)
            if all(name in old and _is_current(old[name], made_from) for name in wave.chunks):
                wave = replace(wave, state="current")
            elif not dry_run:
                _write_wave(config, workspace, wave.chunks, members, made_from=made_from, materialize=materialize)
                EventLog(workspace.events, stage="combine").write("wave_combined", wave=number, chunks=len(wave.chunks))
        wanted.update(wave.chunks)
        waves.append(wave)
    removed = [name for name in sorted(old) if name not in wanted and not is_sealed(old[name].folder)]
    if not dry_run:
        for name in removed:
            shutil.rmtree(old[name].folder)
    return CombineReport(tuple(waves), tuple(removed), is_dry_run=dry_run)


def _is_current(chunk: Chunk, made_from: str) -> bool:
    return chunk.info.made_from == made_from and not damaged_files(chunk)


def _planned(workspace: Workspace) -> set[str]:
    plan = read_parts(workspace.plan, ["dataset", "chunk"], schema=PLAN)
    pairs = plan.group_by(["dataset", "chunk"]).aggregate([]).to_pylist()
    return {chunk_name(pair["dataset"], pair["chunk"]) for pair in pairs}


def _wave(
    config: DatasetConfig,
    number: int,
    members: Sequence[Chunk],
    planned: set[str],
    old: dict[str, Chunk],
    first_mixture: dict[str, float],
) -> Wave:
    counts = {chunk.folder.parent.name: chunk.info.num_samples for chunk in members}
    total = sum(counts.values())
    prefix = f"{config.combine.name}/{number:04d}-"
    packed = {chunk.name for chunk in members}
    waits_for = sorted(name for name in planned - packed if int(name.rpartition("/")[2]) == number)
    names = [f"{prefix}{part:04d}" for part in range(math.ceil(total / config.combine.chunk_size))]
    state = "written"
    sealed = [name for name, chunk in sorted(old.items()) if name.startswith(prefix) and is_sealed(chunk.folder)]
    if sealed:
        state, names, waits_for = "sealed", sorted(name for name in old if name.startswith(prefix)), []
    elif waits_for:
        state = "waiting"
    mixture = {name: count / total for name, count in counts.items()}
    before = first_mixture or mixture
    drift = sum(abs(mixture.get(name, 0) - before.get(name, 0)) for name in {*mixture, *before}) / 2
    return Wave(number, counts, tuple(names), state, drift, tuple(waits_for))


def _made_from(config: DatasetConfig, members: Sequence[Chunk], *, materialize: bool) -> str:
    return digest_of(
        {
            "chunks": [[chunk.name, chunk.info.index_sha256] for chunk in members],
            "combine": config.combine.model_dump(),
            "shard_size": config.pack.shard_size if materialize else 0,
        }
    )


def _write_wave(
    config: DatasetConfig,
    workspace: Workspace,
    names: Sequence[str],
    members: Sequence[Chunk],
    *,
    made_from: str,
    materialize: bool,
) -> None:
    policies = sorted({chunk.info.policy for chunk in members})
    if len(policies) > 1:
        raise ChunkError(f"wave {members[0].folder.name}: captions of {', '.join(policies)}; pack all with one policy")
    held = sorted({chunk.info.shard_policy for chunk in members})
    rows = _shuffled(members, seed=config.combine.seed)
    shards = {
        f"../../{chunk.name}/{shard.path}": replace(shard, path=f"../../{chunk.name}/{shard.path}")
        for chunk in members
        for shard in chunk.info.shards
    }
    bounds = np.linspace(0, rows.num_rows, len(names) + 1).round().astype(int).tolist()
    for name, start, end in zip(names, bounds[:-1], bounds[1:], strict=True):
        folder = workspace.chunks / name
        cut = rows.slice(start, end - start)
        if materialize:
            own_shards, cut = _materialize(folder, cut, shard_size=config.pack.shard_size)
            shard_policy = policies[0]
            texts = captions_digest(cut.column("key").to_pylist(), cut.column("caption").to_pylist())
        else:
            own_shards = [shards[path] for path in sorted(pc.unique(cut.column("shard")).to_pylist())]
            shard_policy = held[0] if len(held) == 1 else "several"
            texts = ""
        chunk = commit_chunk(
            folder,
            cut,
            name=name,
            shards=own_shards,
            policy=policies[0],
            shard_policy=shard_policy,
            made_from=made_from,
            seed=config.combine.seed,
            is_combined=True,
            shard_captions=texts,
        )
        remove_unnamed(chunk)
        logger.info("%s combined: %s samples", name, f"{chunk.info.num_samples:,}")


def _shuffled(members: Sequence[Chunk], *, seed: int) -> pa.Table:
    """Return all index rows of a wave in seeded order, their shards as seen from a sibling chunk."""
    tables = []
    for chunk in members:
        index = chunk.read_index()
        paths = pc.binary_join_element_wise(f"../../{chunk.name}", index.column("shard"), "/")
        tables.append(index.set_column(index.schema.get_field_index("shard"), INDEX.field("shard"), paths))
    rows = pa.concat_tables(tables).sort_by("key")
    generator = np.random.Generator(np.random.Philox([seed, int(members[0].folder.name)]))
    return rows.take(pa.array(generator.permutation(rows.num_rows)))


def _materialize(folder: Path, rows: pa.Table, *, shard_size: int) -> tuple[list[ShardFile], pa.Table]:
    shards, written = [], []
    for number, start in enumerate(range(0, rows.num_rows, shard_size)):
        shard, new_rows = write_shard(folder, number, _copies(folder, rows.slice(start, shard_size)))
        shards.append(shard)
        written += new_rows
    return shards, pa.Table.from_pylist(written, schema=INDEX)


def _copies(folder: Path, rows: pa.Table) -> Iterator[Sample]:
    for row, (key, image, facts, _) in zip(rows.to_pylist(), iterate_rows(folder, rows), strict=True):
        yield Sample(
            key=key,
            image_name=row["image_name"],
            image=image,
            facts=facts | {"caption": row["caption"]},
            caption=row["caption"],
            row={name: row[name] for name in _ROW_COLUMNS},
        )
