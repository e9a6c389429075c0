"""Mix chunk k of every dataset into combined chunks: `python -m sharding combine DATASET.toml`.

Wave k is chunk k of every dataset that still has one, shuffled and cut into equal chunks
`combined/<wave>-<number>`. A combined chunk is an index that points at shards of other chunks; no pixel is copied
unless `materialize` asks for real tars. A dataset with few chunks is exhausted early, so the mixture drifts with
the waves; the report shows how. Waves that a run has started to train are left as they are. What is held out for
validation is in no wave.
"""

import logging
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
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
    list_chunks,
    read_samples,
    remove_unnamed,
    write_shard,
)  # fmt: skip
from sharding.config import DatasetConfig
from sharding.files import digest_of, locked, require_free_bytes
from sharding.runlog import EventLog
from sharding.schema import HELD_OUT, INDEX, PLAN, Workspace
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
    with locked(workspace.chunks, dry_run=dry_run):
        return _combine(config, workspace, materialize=materialize, dry_run=dry_run)


def _combine(config: DatasetConfig, workspace: Workspace, *, materialize: bool, dry_run: bool) -> CombineReport:
    by_wave, old = _chunks(config, workspace)
    planned = _planned(workspace)
    if materialize and not dry_run:
        num_bytes = sum(s.num_bytes for members in by_wave.values() for c in members for s in c.info.shards)
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
            needed = {name for name in wave.chunks if name not in old or not _is_current(old[name], made_from)}
            if not needed:
                wave = replace(wave, state="current")
            elif not dry_run:
                _write_wave(config, workspace, wave.chunks, members, made_from=made_from, materialize=materialize,
                            needed=needed)  # fmt: skip
                EventLog(workspace.events, stage="combine").write("wave_combined", wave=number, chunks=len(wave.chunks))
        wanted.update(wave.chunks)
        waves.append(wave)
    removed = [name for name in sorted(old) if name not in wanted and not is_sealed(old[name].folder)]
    if not dry_run:
        for name in removed:
            shutil.rmtree(old[name].folder)
    return CombineReport(tuple(waves), tuple(removed), is_dry_run=dry_run)


def restore(config: DatasetConfig, workspace: Workspace, names: Sequence[str]) -> list[str]:
    """Write damaged combined chunks again, also trained ones, where that gives the same bytes; return their names.

    It does while the chunks they are mixed from and the settings are the same. Others are left to `combine`.
    Raises ChunkError when a chunk of the wave cannot be read: repair plain chunks first.
    """
    restored = []
    with locked(workspace.chunks):
        by_wave, old = _chunks(config, workspace)
        for name in names:
            members = by_wave.get(int(name.rpartition("/")[2].split("-")[0]), [])
            chunk = old[name]
            materialize = has_own_shards(chunk)
            if chunk.info.made_from == _made_from(config, members, materialize=materialize):
                names_of_wave = _names(config, members)
                _write_wave(config, workspace, names_of_wave, members, made_from=chunk.info.made_from,
                            materialize=materialize, needed={name})  # fmt: skip
                restored.append(name)
    return restored


def has_own_shards(chunk: Chunk) -> bool:
    """Tell whether a chunk has tars of its own; a combined chunk that is not materialized has none."""
    return any("/" not in shard.path for shard in chunk.info.shards)


def _chunks(config: DatasetConfig, workspace: Workspace) -> tuple[dict[int, list[Chunk]], dict[str, Chunk]]:
    """Return the trainable plain chunks by number, and the combined ones by name."""
    combined = config.combine.name
    by_wave: dict[int, list[Chunk]] = {}
    old: dict[str, Chunk] = {}
    for chunk in list_chunks(workspace.chunks):
        if not chunk.info.is_combined:
            if chunk.folder.parent.name == combined:
                raise ValueError(f"combine.name: {combined!r} is also a dataset; choose another name")
            by_wave.setdefault(int(chunk.folder.name), []).append(chunk)
        elif chunk.folder.parent.name == combined:
            old[chunk.name] = chunk
    return by_wave, old


def _names(config: DatasetConfig, members: Sequence[Chunk]) -> list[str]:
    total = sum(chunk.info.num_samples for chunk in members)
    number = int(members[0].folder.name)
    num_chunks = math.ceil(total / config.combine.chunk_size)
    return [f"{config.combine.name}/{number:04d}-{part:04d}" for part in range(num_chunks)]


def _is_current(chunk: Chunk, made_from: str) -> bool:
    return chunk.info.made_from == made_from and not damaged_files(chunk)


def _planned(workspace: Workspace) -> set[str]:
    plan = read_parts(workspace.plan, ["dataset", "chunk"], schema=PLAN)
    pairs = plan.group_by(["dataset", "chunk"]).aggregate([]).to_pylist()
    return {chunk_name(pair["dataset"], pair["chunk"]) for pair in pairs if pair["chunk"] != HELD_OUT}


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
    names = _names(config, members)
    state = "written"
    sealed = [name for name, chunk in sorted(old.items()) if name.startswith(prefix) and is_sealed(chunk.folder)]
    if sealed:
        state, names, waits_for = "sealed", sorted(name for name in old if name.startswith(prefix)), []
    elif waits_for:
        state = "waiting"
    mixture = {name: count / total for name, count in counts.items()}
    before = first_mixture or mixture
    drift = math.fsum(abs(mixture.get(name, 0) - before.get(name, 0)) for name in {*mixture, *before}) / 2
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
    needed: Collection[str],
) -> None:
    """Shuffle the rows of a wave, cut them into the chunks `names`, and write those that are `needed`."""
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
        if name not in needed:
            continue
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
    """Yield samples as they are packed, except that their captions are the index's."""
    for sample in read_samples(folder, rows):
        caption = sample.row["caption"]
        row = {name: sample.row[name] for name in _ROW_COLUMNS}
        yield replace(sample, facts={**sample.facts, "caption": caption}, caption=caption, row=row)
