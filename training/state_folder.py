"""A saved state on disk: its manifest, verifying, loading, choosing the newest, removing old ones.

    state-00041216/  model.safetensors  optimizer.safetensors  ema.safetensors …      one file per component
                     model.rank-0001.safetensors …                                    of a sharded engine: one per rank
                     facts.json                                                       counters, loss tables, small facts
                     manifest.json     written last: name, size and SHA-256 of every file, the global step, a digest

A folder whose name holds `.partial-` is not a state, whatever is in it. Writing states is in `state`.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sharding.files import TEMPORARY_MARK, digest_of, fsync_folder, sha256_file
from training.tensor_file import TensorFileError, WrittenFile, read_tensors

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FACTS = "facts.json"
FORMAT = 1
_REPLACED_MARK = ".replaced-"


class StateError(ValueError):
    """A state is missing, incomplete or damaged, or cannot be saved."""


# --- the manifest ---


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    global_step: int
    files: dict[str, WrittenFile] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The state's identity in the ledger."""
        return digest_of(self._body())

    def _body(self) -> dict[str, Any]:
        files = {name: {"num_bytes": one.num_bytes, "sha256": one.sha256} for name, one in sorted(self.files.items())}
        return {"format": FORMAT, "global_step": self.global_step, "files": files}

    def encode(self) -> memoryview:
        return memoryview((json.dumps({**self._body(), "digest": self.digest}, indent=2) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read a state's manifest without looking at the files. Raises StateError."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {name: WrittenFile(**one) for name, one in raw["files"].items()}
        manifest = Manifest(raw["global_step"], files)
        is_right = raw["digest"] == manifest.digest and raw["format"] == FORMAT
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{folder}: no {MANIFEST}: not a complete state") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise StateError(f"{path}: cannot be understood ({error}); the state is damaged") from error
    if not is_right:
        raise StateError(f"{path}: its digest does not fit; the state is damaged or of another version")
    return manifest


def verify_state(folder: Path, *, trusted: Container[str] = ()) -> Manifest:
    """Read every byte of a state and compare with its manifest. Raises StateError naming the first bad file.

    trusted: digests of states that this process has itself written and hashed, or verified before: of these only
    manifest and sizes are compared, since reading tens of gigabytes again at every save would tell nothing new.
    """
    manifest = read_manifest(folder)
    _require_sizes(folder, manifest)
    if manifest.digest in trusted:
        return manifest
    for name, written in manifest.files.items():
        try:
            actual = sha256_file(folder / name)
        except OSError as error:
            raise StateError(f"{folder / name}: cannot be read ({error}); the state is damaged") from error
        if actual != written.sha256:
            raise StateError(f"{folder / name}: SHA-256 {actual[:12]}…, {written.sha256[:12]}… was saved; damaged")
    return manifest


def _require_sizes(folder: Path, manifest: Manifest) -> None:
    for name, written in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError:
            raise StateError(f"{folder / name}: missing; the state is damaged") from None
        if num_bytes != written.num_bytes:
            raise StateError(f"{folder / name}: {num_bytes:,} bytes, {written.num_bytes:,} were saved; damaged")


being_written: set[Path] = set()
"""Partial folders that this process is writing."""


# --- loading ---


@dataclass(frozen=True)
class LoadedState:
    """A state to load from. Components are read when asked for, and hashed again while they are."""

    folder: Path
    manifest: Manifest
    facts: dict[str, Any]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, sharded ones once."""
        names = (name.split(".")[0] for name in self.manifest.files if name.endswith(".safetensors"))
        return tuple(dict.fromkeys(names))

    def num_ranks(self, component: str) -> int:
        """Return how many ranks saved a part of a sharded component; 0: it is whole."""
        return sum(name.startswith(f"{component}.rank-") for name in self.manifest.files)

    def component(self, name: str, *, rank: int | None = None) -> dict[str, Tensor]:
        """Read a component onto the CPU, in memory of its own. rank: whose part of a sharded one. Raises StateError."""
        file_name = f"{name}.safetensors" if rank is None else f"{name}.rank-{rank:04d}.safetensors"
        if file_name not in self.manifest.files:
            raise StateError(f"{self.folder}: has no {file_name}; it has {', '.join(self.manifest.files)}")
        try:
            return read_tensors(self.folder / file_name, expected_sha256=self.manifest.files[file_name].sha256)
        except (TensorFileError, OSError) as error:
            raise StateError(f"{error}; resume from another state") from error


def load_state(folder: Path, *, is_verified: bool = False) -> LoadedState:
    """Open a state after reading and comparing every byte. Raises StateError.

    is_verified: `newest_verified` has just done so; then only sizes and facts are compared here. Components are hashed
    when they are read in any case.
    """
    manifest = read_manifest(folder) if is_verified else verify_state(folder)
    _require_sizes(folder, manifest)
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
    for _, folder in sorted(candidates, key=_age, reverse=True):
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


def _age(state: tuple[int, Path]) -> tuple[int, bool]:
    global_step, folder = state
    return global_step, _REPLACED_MARK not in folder.name


# --- keeping and removing ---


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
    counted, reported and kept for a person to look at. keep_last: at least 1.
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
    for _, folder in sorted(states, key=_age, reverse=True):
        if num_kept == keep_last:
            _remove(folder)
            removed.append(folder)
            continue
        try:
            verify_state(folder, trusted=trusted)
            num_kept += 1
        except StateError as error:
            logger.warning("%s", error)
    return removed


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


# --- publishing ---


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
