"""The chunks of a run in order, which are done, and which is next. Reads only files; no torch."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.chunk import HELD_OUT_NAME, Chunk, ChunkError, list_chunks
from sharding.config import ConfigError
from sharding.schema import Workspace
from training.chunk_history import ChunkRecord
from training.chunk_records import chunk_records
from training.ledger import Line
from training.run_dir import RunDir


def once(_chunk: str) -> int:
    """Return the number of epochs of a run that trains each chunk once."""
    return 1


@dataclass(frozen=True)
class Campaign:
    """The chunks of a run, in training order, and what the ledger says about them."""

    names: tuple[str, ...]
    """Those in the workspace, and those that the run has started although they are gone from there."""
    chunks: Mapping[str, Chunk]
    """Those in the workspace."""
    lines: tuple[Line, ...]
    records: Mapping[str, ChunkRecord]
    epochs: Callable[[str], int] = once
    """Of each chunk, by name. One that is done in fewer, because the run was extended since, is not done."""

    @property
    def next(self) -> str | None:
        """The chunk that is half trained, else the first one that is not done; None when all are."""
        return next_chunk(self.names, self.records, epochs=self.epochs)

    def is_done(self, name: str) -> bool:
        """Tell whether a chunk is trained in all its epochs."""
        return is_done(name, self.records, epochs=self.epochs)

    def require_turn_of(self, name: str) -> None:
        """Raise ChunkError if `name` is not in the run or another chunk comes before it."""
        require_turn_of(name, self.names, self.records, epochs=self.epochs)

    def chunk(self, name: str) -> Chunk:
        """Return a chunk of the workspace. Raises ChunkError when it is not in the run, or gone."""
        require_in_campaign(name, self.names)
        if name not in self.chunks:
            raise ChunkError(f"chunk {name}: this run has started it, but it is gone from the workspace; restore it")
        return self.chunks[name]


def read_campaign(
    workspace: Path, patterns: Sequence[str], run_dir: RunDir | None, *, epochs: Callable[[str], int] = once
) -> Campaign:
    """Return the chunks that match, pattern by pattern, each pattern's sorted by name, none twice.

    run_dir: None for a run that does not exist yet. A chunk may be deleted from the workspace once it is done: the
    ledger remembers it. What is held out for validation matches no pattern.
    Raises ConfigError for a pattern that asks for held-out chunks, ChunkError when one matches nothing, LedgerError
    for a damaged ledger.
    """
    lines = tuple(run_dir.read_ledger()) if run_dir is not None else ()
    records = chunk_records(lines)
    there = {chunk.name: chunk for chunk in list_chunks(Workspace(workspace).chunks)}
    known = {*there, *(name for name, record in records.items() if record.status != "superseded")}
    names: dict[str, None] = {}
    for pattern in patterns:
        require_not_held_out(pattern)
        matching = sorted(fnmatch.filter(known, pattern))
        if not matching:
            shown = ", ".join(sorted(there)[:5]) or "no chunks at all"
            to_do = "; run `python -m training pack-concepts RUN.toml` first" * pattern.startswith("concepts/")
            raise ChunkError(f"data.chunks: {pattern!r} matches no chunk in {workspace}; there are {shown}{to_do}")
        names.update(dict.fromkeys(matching))
    chunks = {name: there[name] for name in names if name in there}
    return Campaign(tuple(names), chunks, lines, records, epochs)


def next_chunk(
    names: Sequence[str], records: Mapping[str, ChunkRecord], *, epochs: Callable[[str], int] = once
) -> str | None:
    """Return the chunk that is half trained, else the first one that is not done, or None when all are."""
    waiting = [name for name in names if not is_done(name, records, epochs=epochs)]
    return next(iter(in_turn(waiting, records)), None)


def in_turn(names: Sequence[str], records: Mapping[str, ChunkRecord]) -> list[str]:
    """Return chunks that are to be trained in the order in which they can be: the half trained one comes first."""
    return sorted(names, key=lambda name: name not in records or records[name].status != "running")


def is_done(name: str, records: Mapping[str, ChunkRecord], *, epochs: Callable[[str], int] = once) -> bool:
    """Tell whether the ledger says that a chunk is trained in all its epochs."""
    return name in records and records[name].is_done(epochs(name))


def chunk_range(names: Sequence[str], span: str) -> list[str]:
    """Return the chunks from A to B, both included, for `A:B`; each is a name or its number in the run from 0.

    Left out, A is the first and B the last; `7:` is all from the eighth on. Raises ChunkError for a chunk that is not
    in the run, ConfigError for anything else.
    """
    first, colon, last = span.partition(":")
    if not colon:
        raise ConfigError(f"--chunks {span}: give two chunks, as in newest/0000:newest/0009, 0:9 or 10:")
    start = _number_of(first, names) if first else 0
    end = _number_of(last, names) if last else len(names) - 1
    if end < start:
        raise ConfigError(f"--chunks {span}: {names[end]} comes before {names[start]} in this run")
    return list(names[start : end + 1])


def _number_of(place: str, names: Sequence[str]) -> int:
    if place.isdigit():
        if int(place) >= len(names):
            raise ConfigError(f"--chunks: there is no chunk number {place}; the run has {len(names)}, from 0")
        return int(place)
    require_in_campaign(place, names)
    return list(names).index(place)


def require_not_held_out(name: str) -> None:
    """Raise ConfigError if a chunk's name, or a pattern, is that of a dataset's held-out chunk."""
    if name.rpartition("/")[2] == HELD_OUT_NAME:
        raise ConfigError(
            f"chunk {name}: it is held out for validation and no run trains it; name a numbered chunk, "
            "or set plan.held_out = 0, plan and pack again to release it for training"
        )


def require_in_campaign(name: str, names: Sequence[str]) -> None:
    """Raise ChunkError if the run has no such chunk, ConfigError if it is held out."""
    require_not_held_out(name)
    if name not in names:
        raise ChunkError(f"chunk {name}: not in this run's data.chunks; there are {', '.join(names[:5])} …")


def require_turn_of(
    name: str, names: Sequence[str], records: Mapping[str, ChunkRecord], *, epochs: Callable[[str], int] = once
) -> None:
    """Raise ChunkError if `name` is not in the campaign, or a chunk before it is not done, or another half trained."""
    require_in_campaign(name, names)
    if next_chunk(names, records, epochs=epochs) == name or is_done(name, records, epochs=epochs):
        return
    for other in names:
        if other != name and other in records and records[other].status == "running":
            raise ChunkError(f"chunk {name}: {other} is half trained and not complete in this run; train it first")
    before = names[: names.index(name)]
    if missing := [parent for parent in before if not is_done(parent, records, epochs=epochs)]:
        raise ChunkError(f"chunk {name}: {missing[0]} comes before it and is not complete in this run; train it first")
