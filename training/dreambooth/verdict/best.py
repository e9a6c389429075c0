"""The best state of a run so far: which states are there, and a mark beside the one that is kept.

`training.kept_states` reads the mark: a file `best` in a chunk's folder, holding the name of one of its states.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from sharding.files import open_replacing
from training.kept_states import BEST_MARK
from training.ledger import Line
from training.run_dir import RunDir
from training.state_manifest import StateError, read_manifest

logger = logging.getLogger(__name__)


def saved_states(run_dir: RunDir) -> dict[int, Path]:
    """Return the states that are there by global step; a chunk's final one before another of its step."""
    found: dict[int, Path] = {}
    for folder in sorted(run_dir.state_folders(), key=lambda path: path.name == "final"):
        try:
            found[read_manifest(folder).global_step] = folder
        except StateError as error:
            logger.warning("not a candidate for the best state: %s", error)
    return found


def keep_best(run_dir: RunDir, folder: Path) -> None:
    """Keep this state from now on, and no longer the one that was the best before."""
    mark = folder.parent / BEST_MARK
    if not mark.exists() or mark.read_text(encoding="utf-8") != folder.name:
        with open_replacing(mark) as stream:
            stream.write(folder.name.encode())
    for other in _marks(run_dir):  # last: a kill leaves one mark too many, not one too few
        if other != mark:
            other.unlink(missing_ok=True)


def best_state(run_dir: RunDir) -> Path:
    """Return the state that is marked, whether it is there or still being written. Raises StateError without one."""
    mark = next(iter(_marks(run_dir)), None)
    if mark is None:
        raise StateError(
            f"{run_dir.root}: no state is known to be the best: a verdict has to come at a step that saves one "
            "(previews or validation at multiples of save.every_steps, or the end of a chunk)"
        )
    return mark.with_name(mark.read_text(encoding="utf-8"))


def _marks(run_dir: RunDir) -> list[Path]:
    folder = run_dir.chunks_folder
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{BEST_MARK}") if path.is_file())


def epochs_until(lines: Iterable[Line], step: int) -> int:
    """Return how many epochs a run had trained at a global step, a begun one counted as a whole."""
    first: dict[str, Mapping[str, object]] = {}
    for line in lines:
        if line.event == "started":
            first.setdefault(line.fields["chunk"], line.fields)
    epochs = 0.0
    for fields in first.values():
        start, steps, planned = (int(str(fields[name])) for name in ("global_step", "steps", "epochs"))
        epochs += planned * min(max(step - start, 0) / max(steps, 1), 1.0)
    return math.ceil(round(epochs, 6))
