"""List the chunks of a workspace, planned and packed, with their counts and the runs that have trained them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sharding.chunk import Chunk, chunk_name
from sharding.reporting.census import place_in
from sharding.reporting.questions import Questions, rows_of
from sharding.schema import HELD_OUT, PLAN, Workspace
from sharding.tables import list_parts

_SEAL = "trained-by-"


@dataclass(frozen=True)
class ChunkCount:
    """One chunk. `num_planned` is 0 for a combined chunk, which no plan names; `num_packed` before it is packed."""

    name: str
    num_planned: int
    num_packed: int
    num_dropped: int
    num_shards: int
    num_bytes: int
    """Of its own tars."""
    policy: str
    is_held_out: bool
    is_combined: bool
    sealed_by: tuple[str, ...]

    @property
    def state(self) -> str:
        """In one or two words."""
        kind = "held out" if self.is_held_out else "combined" if self.is_combined else ""
        state = "trained" if self.sealed_by else "packed" if self.num_packed else "planned"
        return f"{kind}, {state}" if kind else state

    @property
    def num_images(self) -> int:
        return self.num_packed or self.num_planned


def count_chunks(
    questions: Questions, workspace: Workspace, chunks: Sequence[Chunk], *, order: Sequence[str]
) -> tuple[ChunkCount, ...]:
    """List every planned and every packed chunk; by dataset as in `order`, other datasets after those."""
    plan = rows_of(list_parts(workspace.plan), PLAN)
    rows = questions.ask(f"select dataset, chunk, count(*) as n from {plan} group by all")
    planned = {chunk_name(row["dataset"], row["chunk"]): (row["n"], row["chunk"] == HELD_OUT) for row in rows}
    packed = {chunk.name: chunk for chunk in chunks}

    def place(name: str) -> tuple[bool, int, str]:
        dataset = name.split("/")[0]
        is_combined = name in packed and packed[name].info.is_combined
        return (is_combined, place_in(order, dataset), name)

    return tuple(
        _count(name, *planned.get(name, (0, False)), packed.get(name))
        for name in sorted({*planned, *packed}, key=place)
    )


def _count(name: str, num_planned: int, is_held_out: bool, chunk: Chunk | None) -> ChunkCount:
    if chunk is None:
        return ChunkCount(name, num_planned, 0, 0, 0, 0, "", is_held_out, False, ())
    own = [shard for shard in chunk.info.shards if "/" not in shard.path]
    return ChunkCount(
        name=name,
        num_planned=num_planned,
        num_packed=chunk.info.num_samples,
        num_dropped=chunk.info.num_dropped,
        num_shards=len(chunk.info.shards),
        num_bytes=sum(shard.num_bytes for shard in own),
        policy=chunk.info.policy,
        is_held_out=chunk.info.is_held_out,
        is_combined=chunk.info.is_combined,
        sealed_by=sealing_runs(chunk.folder),
    )


def sealing_runs(folder: Path) -> tuple[str, ...]:
    """Return the ids of the runs that have started to train the chunk in `folder`."""
    return tuple(sorted(path.name.removeprefix(_SEAL) for path in folder.glob(f"{_SEAL}*")))


def ranges(chunks: Sequence[ChunkCount]) -> list[tuple[str, int, int, str]]:
    """Return the list in short: (names, chunks, images in each, state) of neighbours that are alike."""
    alike = groupby(chunks, key=lambda chunk: (chunk.name.split("/")[0], chunk.num_images, chunk.state))
    rows = []
    for (_, num_images, state), members in alike:
        names = [chunk.name for chunk in members]
        span = names[0] if len(names) == 1 else f"{names[0]} – {names[-1].split('/')[-1]}"
        rows.append((span, len(names), num_images, state))
    return rows
