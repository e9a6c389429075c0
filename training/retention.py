"""Which states and exported weights of finished chunks are kept. For the holder of the run's lock.

States within a chunk are thinned out by `training.state_folder.retain` while it is trained. What is removed here is
what newer, verified states, or newer weights, stand in for.
"""

import logging
import os
from collections.abc import Container, Mapping
from pathlib import Path

from sharding.files import TEMPORARY_MARK
from training.chunk_history import ChunkRecord
from training.kept_states import delete_folder, is_best, remove_partials, retain_states
from training.run_dir import RunDir

logger = logging.getLogger(__name__)


def retain_finals(
    records: Mapping[str, ChunkRecord],
    run_dir: RunDir,
    *,
    keep_chunks: int,
    keep_every_chunks: int = 0,
    trusted: Container[str] = (),
) -> list[Path]:
    """Of each finished chunk keep the final state only, and of these the newest `keep_chunks`; return what went.

    keep_every_chunks: besides them keep that of every n-th chunk of the run for good; 0 keeps none. The state of a
    chunk under way is not looked at. Nothing goes before the ones that stay verify, see `retain_states`.
    """
    removed, finals = [], []
    for name, record in records.items():
        if record.status != "done":
            continue
        remove_partials(run_dir.chunk_folder(name))  # what a kill, or a file that was open, kept from going
        folders = run_dir.state_folders(name)
        removed += retain_states(folders, keep_last=1, trusted=trusted)
        if not is_milestone(record.position_in_run, keep_every_chunks):
            finals += [folder for folder in folders if folder.name == "final" and folder not in removed]
    return removed + retain_states(finals, keep_last=keep_chunks, trusted=trusted)


def is_milestone(position_in_run: int, keep_every_chunks: int) -> bool:
    """Tell whether the chunk at a place (from 0) is one of every n-th."""
    return keep_every_chunks > 0 and (position_in_run + 1) % keep_every_chunks == 0


def retain_exports(records: Mapping[str, ChunkRecord], run_dir: RunDir, *, keep_exports: int) -> list[Path]:
    """Keep the weights of the newest `keep_exports` chunks that have some, and those of the run's best state; 0 keeps
    all. Return what went.

    Weights that a person put elsewhere, or wrote with `training export`, are not looked at.
    """
    done = sorted(
        (record for record in records.values() if record.status == "done" and record.last_state is not None),
        key=lambda record: record.last_state.global_step if record.last_state is not None else 0,
    )
    folders = [folder for record in done if (folder := run_dir.weights_folder(record.chunk)).is_dir()]
    older = folders[:-keep_exports] if keep_exports else []
    removed = [folder for folder in older if not is_best(folder.with_name("final"))]
    for folder in removed:
        doomed = folder.with_name(f"{folder.name}{TEMPORARY_MARK}removed-{os.getpid()}")
        os.replace(folder, doomed)
        delete_folder(doomed)
        logger.info("removed %s: save.keep_exports = %d", folder, keep_exports)
    return removed
