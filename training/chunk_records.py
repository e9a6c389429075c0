"""What the ledger says about the chunks of a run: which is done, from where each starts, what is not tried again.

Pure functions of the lines; nothing is read or written. The file itself is `training.ledger`'s, the history of one
chunk `training.chunk_history`'s.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from training.chunk_history import ChunkRecord, LastState, histories
from training.ledger import Line


@dataclass(frozen=True)
class Totals:
    """Sums over the chunks that are not superseded, as of the newest state."""

    global_step: int
    images_seen: int
    applied_updates: int
    skipped_steps: int
    broken_images: int
    busy_seconds: float


def chunk_records(lines: Iterable[Line]) -> dict[str, ChunkRecord]:
    """Return each chunk's record, in the order of their (latest) first start.

    A superseded chunk that started again counts from there. What a launch lost (steps after the state it resumed
    from) and what was rolled back is not in the counts. Raises LedgerError when a line is about an unknown chunk.
    """
    return {chunk: history.record() for chunk, history in histories(lines).items()}


def parent_of(lines: Iterable[Line], chunk: str) -> str | None:
    """Return the chunk whose final state `chunk` starts from; None: it is the run's first.

    For a chunk under way: the parent it started from. Otherwise the done one that is not superseded and has come
    furthest, which for a chunk that is trained again may be the chunk itself.
    """
    records = chunk_records(lines)
    if chunk in records and records[chunk].status == "running":
        return records[chunk].parent
    done = [record for record in records.values() if record.status == "done" and record.last_state is not None]
    return max(done, key=_reached).chunk if done else None


def imported_state(lines: Iterable[Line]) -> LastState | None:
    """Return the state of another trainer that the run's first chunk starts from; None: it has none."""
    found = None
    for line in lines:
        if line.event == "imported":
            found = LastState(line.fields["path"], line.fields["global_step"])
    return found


def _reached(record: ChunkRecord) -> int:
    return record.last_state.global_step if record.last_state is not None else record.start_global_step


def chunks_since(lines: Iterable[Line], chunk: str) -> list[str]:
    """Return `chunk` and those that started after it: what has to be superseded before it is trained anew."""
    live = [record.chunk for record in chunk_records(lines).values() if record.status != "superseded"]
    return live[live.index(chunk) :] if chunk in live else []


def steps_to_pass_over(lines: Iterable[Line], chunk: str, *, reason: str | None = None) -> frozenset[int]:
    """Return the global steps that rollbacks of this chunk said not to try again.

    reason: only those of rollbacks for it; not empty: the chunk went back for it before.
    """
    steps: set[int] = set()
    for line in lines:
        if line.event == "rolled_back" and line.fields["chunk"] == chunk:
            if reason not in (None, line.fields["reason"]):
                continue
            steps.update(line.fields["pass_over"])
        elif line.event == "superseded" and chunk in line.fields["chunks"]:
            steps.clear()
    return frozenset(steps)


def undone_states(lines: Iterable[Line], chunk: str) -> frozenset[str]:
    """Return the manifest digests of the chunk's states that a rollback went behind: nothing starts from them."""
    saved: dict[str, int] = {}
    undone: set[str] = set()
    for line in lines:
        if line.event not in ("state_saved", "chunk_done", "rolled_back") or line.fields["chunk"] != chunk:
            continue
        if line.event == "rolled_back":
            undone |= {digest for digest, step in saved.items() if step > line.fields["global_step"]}
        else:
            saved[line.fields["manifest_digest"]] = line.fields["global_step"]
            undone.discard(line.fields["manifest_digest"])
    return frozenset(undone)


def has_state(lines: Iterable[Line], manifest_digest: str) -> bool:
    """Tell whether a state has its line. One that has none was saved by a launch killed before it could write it:

    append its `state_saved` line from the state's facts before the `started` line of the launch that resumes from it.
    """
    chunk, global_step = None, -1
    for line in lines:
        fields = line.fields
        if line.event in ("state_saved", "chunk_done", "imported"):
            if fields["manifest_digest"] == manifest_digest:
                chunk, global_step = fields.get("chunk", ""), fields["global_step"]
        elif line.event == "superseded" and chunk in fields["chunks"] and global_step > fields.get("global_step", -1):
            chunk = None
    return chunk is not None


def totals(lines: Iterable[Line]) -> Totals:
    """Return the run's counters as its newest state holds them."""
    lines = list(lines)
    live = [record for record in chunk_records(lines).values() if record.status != "superseded"]
    imported = imported_state(lines)
    return Totals(
        global_step=max((_reached(record) for record in live), default=imported.global_step if imported else 0),
        images_seen=sum(record.images_trained for record in live),
        applied_updates=sum(record.applied_updates for record in live),
        skipped_steps=sum(record.skipped for record in live),
        broken_images=sum(record.broken for record in live),
        busy_seconds=sum(record.seconds for record in live),
    )
