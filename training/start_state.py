"""Which saved state a chunk goes on from. For rank 0, which alone reads the ledger; the others are told."""

from collections.abc import Sequence
from pathlib import Path

from training.chunk_records import chunk_records, parent_of, steps_to_pass_over, undone_states
from training.rank import Rank
from training.state_folder import StateError, newest_verified, read_manifest


def state_to_start_from(rank: Rank, chunk: str) -> Path | None:
    """Return this chunk's newest verified state, else its parent's final one; None at the start of a run.

    Raises StateError when the ledger names a state but there is none, or none verifies.
    """
    lines = rank.ledger.lines
    if own := _own_states(rank, chunk):
        return _newest(rank, own)
    record = chunk_records(lines).get(chunk)
    if record is not None and record.last_state is not None:
        raise StateError(
            f"chunk {chunk}: the ledger names {record.last_state.path}, but no state is there; restore it from a copy"
        )
    parent = parent_of(lines, chunk)
    return _newest(rank, rank.run_dir.state_folders(parent)) if parent is not None else None


def state_before(rank: Rank, chunk: str, *, step: int) -> Path | None:
    """Return the newest verified state that does not hold global step `step`, to roll back to.

    None when this chunk was rolled back before, and in a run's first chunk before its first state.
    Raises StateError when states are there but none verifies.
    """
    if steps_to_pass_over(rank.ledger.lines, chunk):
        return None
    own = [folder for folder in _own_states(rank, chunk) if read_manifest(folder).global_step < step]
    parent = parent_of(rank.ledger.lines, chunk)
    folders = own or (rank.run_dir.state_folders(parent) if parent is not None else [])
    return _newest(rank, folders) if folders else None


def _own_states(rank: Rank, chunk: str) -> list[Path]:
    """Return the chunk's states but for those that a rollback went behind and was killed before removing."""
    undone = undone_states(rank.ledger.lines, chunk)
    return [folder for folder in rank.run_dir.state_folders(chunk) if not undone or _digest(folder) not in undone]


def _digest(folder: Path) -> str:
    try:
        return read_manifest(folder).digest
    except StateError:
        return ""  # damaged: who chooses the newest says so


def _newest(rank: Rank, folders: Sequence[Path]) -> Path:
    try:
        folder, _ = newest_verified(folders)
    except StateError as error:
        raise StateError(
            f"{error}; restore one of them from a copy, or start a new run folder with exported weights as its first"
        ) from error
    rank.saver.trusted.add(read_manifest(folder).digest)
    return folder
