"""How folders of states come and go: published by a rename, kept while they are among the newest, removed by a rename.

A kill at any moment leaves states and partial folders, never a damaged state. Nothing goes before newer ones verify.
"""

import logging
import os
import shutil
from collections.abc import Container, Iterable
from pathlib import Path

from sharding.files import TEMPORARY_MARK, fsync_folder
from training.state_manifest import StateError, read_manifest, verify_state

logger = logging.getLogger(__name__)

_REPLACED_MARK = ".replaced-"
BEST_MARK = "best"
"""A file beside states, with the name of the one that is kept because it is the run's best."""

being_written: set[Path] = set()
"""Partial folders that this process is writing."""


def publish(partial: Path, folder: Path) -> None:
    """Rename a complete partial folder. An older state of that name gives way, and is a state until the new one is."""
    replaced = folder.with_name(f"{folder.name}{_REPLACED_MARK}{os.getpid()}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(partial, folder)
    fsync_folder(folder.parent)
    if replaced.exists():
        _remove(replaced)


def retain(folder: Path, *, keep_last: int, trusted: Container[str] = ()) -> list[Path]:
    """Keep the newest `keep_last` of the `state-*` in `folder`; remove left-over partial ones. Return what went.

    For the lock holder: what another process left half-written is dead. Other rules as `retain_states`.
    """
    removed = remove_partials(folder)
    for older in sorted(folder.glob(f"*{_REPLACED_MARK}*")):  # a kill came between `publish`'s last two acts
        newer = older.with_name(older.name.split(_REPLACED_MARK)[0])
        if newer.is_dir():
            verify_state(newer, trusted=trusted)
            _remove(older)
            removed.append(older)
    states = [path for path in folder.glob("state-*") if path.is_dir() and TEMPORARY_MARK not in path.name]
    return removed + retain_states(states, keep_last=keep_last, trusted=trusted)


def retain_states(folders: Iterable[Path], *, keep_last: int, trusted: Container[str] = ()) -> list[Path]:
    """Remove all but the `keep_last` newest of these states; return the removed ones.

    Nothing goes before that many newer ones verify (`trusted`: see `verify_state`). A damaged one in the way is not
    counted, reported and kept for a person to look at; the run's best one is kept. keep_last: at least 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: must be at least 1, got {keep_last}")
    states: list[tuple[int, Path]] = []
    for folder in folders:
        try:
            states.append((read_manifest(folder).global_step, folder))
        except StateError as error:
            logger.warning("%s", error)
    if len(states) <= keep_last:
        return []
    num_kept = 0
    removed: list[Path] = []
    for _, folder in sorted(states, key=age, reverse=True):
        if num_kept == keep_last:
            if is_best(folder):
                continue
            _remove(folder)
            removed.append(folder)
            continue
        try:
            verify_state(folder, trusted=trusted)
            num_kept += 1
        except StateError as error:
            logger.warning("%s", error)
    return removed


def is_best(folder: Path) -> bool:
    """Tell whether a state is marked as the run's best."""
    try:
        return (folder.parent / BEST_MARK).read_text(encoding="utf-8") == folder.name
    except FileNotFoundError:
        return False


def remove_partials(folder: Path) -> list[Path]:
    """Remove what dead writers left half-written in `folder`, not what this process is writing. Return what went."""
    partial = (path for path in sorted(folder.glob(f"*{TEMPORARY_MARK}*")) if path.is_dir())
    left_over = [path for path in partial if path not in being_written]
    for path in left_over:
        delete_folder(path)
    return left_over


def delete_folder(folder: Path) -> None:
    """Delete a folder; one that is gone already is no error.

    On NFS a file that some process still has open stays behind as `.nfs…`, and its folder with it: that is left, with
    a warning, to the next `remove_partials`.
    """
    try:
        shutil.rmtree(folder)
    except OSError:
        left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if not all(name.startswith(".nfs") for name in left):
            raise
        if left:
            logger.warning("%s: deleted later, %s is still open in a process", folder, left[0])


def remove_states(folders: Iterable[Path]) -> None:
    """Remove states that are not to be gone on from, such as those that a rollback went behind."""
    for folder in folders:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a state so that one killed half-way is a partial folder, never a damaged state."""
    doomed = folder.with_name(f"{folder.name}{TEMPORARY_MARK}removed-{os.getpid()}")
    os.replace(folder, doomed)
    delete_folder(doomed)


def age(state: tuple[int, Path]) -> tuple[int, bool]:
    """Return what sorts states of (global step, folder): of one step, one that is being replaced is the older."""
    global_step, folder = state
    return global_step, _REPLACED_MARK not in folder.name
