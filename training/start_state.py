"""Which saved state a chunk goes on from. For rank 0, which alone reads the ledger; the others are told."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from training.chunk_history import histories
from training.chunk_records import chunk_records, imported_state, parent_of, steps_to_pass_over, undone_states
from training.ledger import Line
from training.position import Position
from training.rank import Rank
from training.run_dir import RunDir
from training.state_folder import newest_verified
from training.state_manifest import StateError, read_manifest

logger = logging.getLogger(__name__)


def state_to_start_from(rank: Rank, chunk: str) -> Path | None:
    """Return this chunk's newest verified state, else its parent's final one, else an imported one; None at the start
    of a run.

    Raises StateError when the ledger names a state but there is none, or none verifies.
    """
    folders = states_to_start_from(rank.run_dir, rank.ledger.lines, chunk)
    return _newest(rank, folders) if folders is not None else None


def states_to_start_from(run_dir: RunDir, lines: Sequence[Line], chunk: str) -> list[Path] | None:
    """Return the states of which the newest verified one is what `chunk` starts from; None at the start of a run.

    Raises StateError when the ledger names a state but there is none.
    """
    if own := _own_states(run_dir, lines, chunk):
        return own
    record = chunk_records(lines).get(chunk)
    if (
        record is not None
        and record.status != "superseded"
        and record.last_state is not None
        and record.last_state.global_step > _visit_start(lines, chunk)
    ):
        raise StateError(
            f"chunk {chunk}: the ledger names {record.last_state.path}, but no state is there; restore it from a copy"
        )
    return _parents_states(run_dir, lines, chunk)


def states_before(rank: Rank, chunk: str, *, step: int, reason: str) -> list[Path]:
    """Return the states that do not hold global step `step`, of which one may be gone back to; not yet verified.

    Empty when this chunk went back for this reason before, and in a run's first chunk before its first state. A damaged
    one is left out, with a warning.
    """
    if steps_to_pass_over(rank.ledger.lines, chunk, reason=reason):
        return []
    run_dir, lines = rank.run_dir, rank.ledger.lines
    own = [folder for folder in _own_states(run_dir, lines, chunk) if _holds_less_than(folder, step)]
    return own or _parents_states(run_dir, lines, chunk) or []


def state_before(rank: Rank, chunk: str, *, step: int, reason: str) -> Path | None:
    """Return the newest verified one of `states_before`; None when there is none.

    Raises StateError when states are there but none verifies.
    """
    folders = states_before(rank, chunk, step=step, reason=reason)
    return _newest(rank, folders) if folders else None


def _parents_states(run_dir: RunDir, lines: Sequence[Line], chunk: str) -> list[Path] | None:
    """Return the states of the chunk before, for a run's first chunk the imported one; None when there is none."""
    parent = parent_of(lines, chunk)
    if parent is not None:
        return run_dir.state_folders(parent)
    imported = imported_state(lines)
    return [run_dir.root / imported.path] if imported is not None else None


def _holds_less_than(folder: Path, step: int) -> bool:
    try:
        return read_manifest(folder).global_step < step
    except StateError as error:
        logger.warning("not gone back to: %s", error)
        return False


def first_position(lines: Iterable[Line], chunk: str, base: Position) -> Position:
    """Return where a chunk starts from the state of another, which stands at `base`.

    At epoch 0 with counters of its own at 0; when the run is extended and trains it again, at its first new epoch with
    the counters that it had.
    """
    start, history = base.at_start_of(chunk), histories(lines).get(chunk)
    if history is None or history.status == "superseded":
        return start
    first_epoch = history.latest["epochs"] if history.status == "done" else history.visits[-1].first_epoch
    if first_epoch == 0:
        return start
    if history.status == "running":
        history.go_back_to(history.visits[-1].global_step)
    last, num_broken = history.saved[-1], {step: len(one["keys"]) for step, one in history.broken.items()}
    return replace(
        start,
        epoch=first_epoch,
        chunk_images_trained=last["images_trained"],
        chunk_images_skipped=sum(len(one["keys"]) - num_broken.get(step, 0) for step, one in history.skipped.items()),
        chunk_images_broken=sum(num_broken.values()),
        chunk_applied_updates=last["applied_updates"],
        chunk_busy_seconds=last["busy_seconds"],
    )


def _own_states(run_dir: RunDir, lines: Sequence[Line], chunk: str) -> list[Path]:
    """Return the chunk's states since its latest start, without those that a killed rollback could not remove."""
    record = chunk_records(lines).get(chunk)
    if record is not None and record.status == "superseded":
        return []
    undone, start = undone_states(lines, chunk), _visit_start(lines, chunk)

    def is_own(folder: Path) -> bool:
        try:
            manifest = read_manifest(folder)
        except StateError:
            return True  # damaged: who chooses the newest says so
        return manifest.global_step > start and manifest.digest not in undone

    return [folder for folder in run_dir.state_folders(chunk) if is_own(folder)]


def _visit_start(lines: Sequence[Line], chunk: str) -> int:
    """Return the global step from which the chunk is, or is now to be, trained; -1 when it never was."""
    record = chunk_records(lines).get(chunk)
    if record is None:
        return -1
    if record.status == "done" and record.last_state is not None:
        return record.last_state.global_step
    return record.visits[-1].global_step


def _newest(rank: Rank, folders: Sequence[Path]) -> Path:
    try:
        folder, _ = newest_verified(folders)
    except StateError as error:
        raise StateError(
            f"{error}; restore one of them from a copy, or start a new run folder with exported weights as its first"
        ) from error
    rank.saver.trusted.add(read_manifest(folder).digest)
    return folder
