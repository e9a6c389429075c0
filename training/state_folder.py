"""A saved state on disk: load it, tensor by tensor, and choose the newest one that verifies.

    state-00041216/  model.safetensors  optimizer.safetensors  ema.safetensors …      one file per component
                     facts.json                                                       counters and other small facts
                     manifest.json                                                    written last: `state_manifest`

A folder whose name holds `.partial-` is not a state, whatever is in it. States are written in `state`,
published and removed in `kept_states`.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sharding.files import TEMPORARY_MARK
from training.kept_states import age
from training.state_manifest import FACTS, Manifest, StateError, read_manifest, require_sizes, verify_state
from training.tensor_file import NamedTensors, TensorFile, TensorFileError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedState:
    """A state to load from. Components are read when asked for, and hashed again while they are."""

    folder: Path
    manifest: Manifest
    facts: dict[str, Any]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components."""
        return tuple(name.split(".")[0] for name in self.manifest.files if name.endswith(".safetensors"))

    def tensors(self, component: str) -> NamedTensors:
        """Open a component, to go through its tensors once, each in CPU memory of its own. Raises StateError.

        Only the one that is looked at needs memory: let go of it before the next.
        """
        name = f"{component}.safetensors"
        if name not in self.manifest.files:
            raise StateError(f"{self.folder}: has no {name}; it has {', '.join(self.manifest.files)}")
        with _as_state_errors():
            return _Component(self.folder / name, expected_sha256=self.manifest.files[name].sha256)

    def component(self, name: str) -> dict[str, Tensor]:
        """Read a whole component into CPU memory. Raises StateError."""
        return dict(self.tensors(name).items())


class _Component(TensorFile):
    def items(self) -> Iterator[tuple[str, Tensor]]:
        """As TensorFile's; raises StateError."""
        with _as_state_errors():
            yield from super().items()


@contextmanager
def _as_state_errors() -> Iterator[None]:
    try:
        yield
    except (TensorFileError, OSError) as error:
        raise StateError(f"{error}; resume from another state") from error


def load_state(folder: Path, *, is_verified: bool = False) -> LoadedState:
    """Open a state after reading and comparing every byte. Raises StateError.

    is_verified: `newest_verified` has just done so; then only sizes and facts are compared here. Components are hashed
    when they are read in any case.
    """
    manifest = read_manifest(folder) if is_verified else verify_state(folder)
    require_sizes(folder, manifest)
    data = (folder / FACTS).read_bytes() if FACTS in manifest.files else b""
    if FACTS in manifest.files and hashlib.sha256(data).hexdigest() != manifest.files[FACTS].sha256:
        raise StateError(f"{folder / FACTS}: its SHA-256 is not the saved one; the state is damaged")
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise StateError(f"{folder / FACTS}: cannot be understood ({error}); the state is damaged") from error
    if facts.get("global_step") != manifest.global_step:
        raise StateError(f"{folder}: facts are of step {facts.get('global_step')}, manifest of {manifest.global_step}")
    return LoadedState(folder, manifest, facts)


def newest_verified(folders: Iterable[Path]) -> tuple[Path, list[tuple[Path, str]]]:
    """Return the state with the highest global step that verifies, and the damaged ones met with their problems.

    The step is the manifest's, names mean nothing; partial folders are no candidates. Every problem is logged as a
    warning. Raises StateError listing the problems when no folder verifies.
    """
    problems: list[tuple[Path, str]] = []
    candidates: list[tuple[int, Path]] = []
    for folder in folders:
        if TEMPORARY_MARK in folder.name:
            continue
        try:
            candidates.append((read_manifest(folder).global_step, folder))
        except StateError as error:
            problems.append((folder, str(error)))
    newest = None
    for _, folder in sorted(candidates, key=age, reverse=True):
        try:
            verify_state(folder)
        except StateError as error:
            problems.append((folder, str(error)))
        else:
            newest = folder
            break
    for folder, problem in problems:
        logger.warning("state %s is not used: %s", folder.name, problem)
    if newest is None:
        raise StateError(
            "no state that verifies: " + ("; ".join(problem for _, problem in problems) or "there is none")
        )
    return newest, problems
