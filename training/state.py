"""Take and save states: everything a run needs to go on exactly, whole or not at all.

A state is written as `<name>.partial-<token>`, fsynced, renamed. The snapshot is taken on the caller's thread; the
background thread only does file I/O. Nothing here decides when to save, or knows a model. Weights for other programs
are not states.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sharding.files import TEMPORARY_MARK, fsync_folder, require_free_bytes
from training.state_folder import (
    FACTS,
    MANIFEST,
    Manifest,
    StateError,
    being_written,
    publish,
    read_manifest,
    retain,
)
from training.tensor_file import WrittenFile, write_file, write_tensors
from training.tensor_parts import InParts, brought_together

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


# --- a snapshot ---


@dataclass(frozen=True)
class Snapshot:
    """One rank's copy of its state on the CPU. Owned by the saver from `save` on."""

    tensors: dict[str, dict[str, Tensor]]
    """{component: {name: contiguous CPU tensor}}."""
    facts: dict[str, Any]
    """JSON-able; holds the integer `global_step`. Only rank 0's are saved."""
    sharded: frozenset[str] = frozenset()
    """Components of which every rank saves its own part."""


def take_snapshot(
    tensors: Mapping[str, Mapping[str, Tensor | InParts]], facts: Mapping[str, Any], *, sharded: Iterable[str] = ()
) -> Snapshot:
    """Copy tensors to CPU memory, keeping dtypes; views, shared and 0-d ones become tensors of their own.

    Those that lie in parts are brought together one by one: the other ranks call `help_snapshot` with the same.
    Raises StateError for facts that are not strict JSON or have no global step.
    """
    step = facts.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise StateError(f"state facts: global_step must be a whole number, got {step!r}")
    try:
        own_facts = json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StateError(f"state facts: not JSON: {error}") from error
    copies = {component: brought_together(named, is_kept=True) for component, named in tensors.items()}
    for component in copies:
        if not component.replace("_", "").replace("-", "").isalnum():
            raise StateError(f"component {component!r}: use letters, digits, - and _: it becomes a file name")
    return Snapshot(copies, own_facts, frozenset(sharded))


def help_snapshot(tensors: Mapping[str, Mapping[str, Tensor | InParts]]) -> None:
    """Give this rank's parts to the rank that takes a snapshot; keeps nothing."""
    for named in tensors.values():
        brought_together(named, is_kept=False)


def state_bytes(tensors: Snapshot | Mapping[str, Mapping[str, Tensor | InParts]]) -> int:
    """Return how many bytes of tensors a state holds; the rest of it is small."""
    components = tensors.tensors if isinstance(tensors, Snapshot) else tensors
    return sum(tensor.numel() * tensor.element_size() for named in components.values() for tensor in named.values())


def check_room(folder: Path, num_bytes: int, *, keep_last: int, num_present: int = 0) -> str:
    """Return the disk forecast for states of `num_bytes` each in `folder`, to print before the first step.

    One more than `keep_last` lie there at a time: the old goes only when the new verifies. num_present: those already
    there. Raises DiskFullError when they do not fit.
    """
    num_states = max(keep_last + 1 - num_present, 1)
    require_free_bytes(folder, num_states * num_bytes, f"{num_states} more states of {num_bytes / 1e9:,.2f} GB")
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    return (
        f"a state takes {num_bytes / 1e9:,.2f} GB on disk and as much memory while it is saved; "
        f"up to {keep_last + 1} at a time, {free_bytes / 1e9:,.2f} GB free in {existing}"
    )


# --- saving ---


class StateSaver:
    """Save states one at a time, in the background or at once. One per rank; all ranks call `save` for each state.

    check: raises when this process may no longer write (`RunLock.check`); called before writing and before publishing.
    on_saved(folder, manifest digest): called on the caller's thread, by `poll`, `drain` or the next `save`, when the
    state is durable: there the ledger gets its line. Rank 0 only.
    keep_last: remove older `state-*` beside a new one once it is durable, on the writer's thread; None: remove nothing.
    """

    def __init__(
        self,
        *,
        asynchronous: bool,
        check: Callable[[], None],
        on_saved: Callable[[Path, str], None] | None = None,
        keep_last: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        wait_seconds: float = 1800.0,
    ) -> None:
        self.last_saved: Path | None = None
        self.trusted: set[str] = set()
        """Digests of states that need not be read again to know that they verify; those saved here are added."""
        self._asynchronous = asynchronous
        self._check = check
        self._on_saved = on_saved
        self._keep_last = keep_last
        self._rank = rank
        self._num_ranks = num_ranks
        self._wait_seconds = wait_seconds
        self._thread: threading.Thread | None = None
        self._published: tuple[Path, str] | None = None
        self._error: BaseException | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save was begun whose outcome was not yet seen by `poll` or `drain`."""
        return self._thread is not None

    def save(self, folder: Path, snapshot: Snapshot, *, token: str | None = None) -> None:
        """Drain the save before, then write `snapshot` as `folder`; returns at once when asynchronous.

        token: the same on all ranks and new for each save (rank 0's process number and step, broadcast); needed with
        several ranks only. Raises what the save before or, when not asynchronous, this one raised.
        """
        self.drain()
        if token is None:
            if self._num_ranks > 1:
                raise StateError("saving with several ranks needs a token that all of them know")
            token = str(os.getpid())
        self._check()
        partial = folder.with_name(f"{folder.name}{TEMPORARY_MARK}{token}")
        if self._num_ranks == 1:
            shutil.rmtree(partial, ignore_errors=True)
        being_written.add(partial)
        # Not a daemon: a launch that ends because of something else still finishes the state it has begun.
        self._thread = threading.Thread(target=self._run, args=(folder, partial, snapshot), name="state-writer")
        self._thread.start()
        if not self._asynchronous:
            self.drain()

    def poll(self) -> Path | None:
        """If a save has ended since, do what `drain` does; otherwise return None at once."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.drain()

    def drain(self) -> Path | None:
        """Wait for the save that is under way and return its folder; None when there is none.

        Raises what the writer raised: DiskFullError, LockLostError, StateError, OSError. Older states are intact then,
        and the next `save` starts afresh. Nothing was published, unless `on_saved` was called first: then the new
        state is good, and removing older ones failed.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        published, self._published = self._published, None
        if published is not None:
            folder, digest = published
            self.last_saved = folder
            if self._on_saved is not None and self._rank == 0:
                self._on_saved(folder, digest)
        if error is not None:
            raise error
        assert published is not None
        return published[0]

    def _run(self, folder: Path, partial: Path, snapshot: Snapshot) -> None:
        try:
            digest = self._write(folder, partial, snapshot)
            self._published = (folder, digest)
            self.trusted.add(digest)
            if self._keep_last is not None and self._rank == 0:
                retain(folder.parent, keep_last=self._keep_last, trusted=self.trusted)
        except BaseException as error:  # handed to the caller's thread by drain
            self._error = error
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            elif partial.is_dir():
                (partial / f"failed.rank-{self._rank:04d}").touch()
        finally:
            being_written.discard(partial)

    def _write(self, folder: Path, partial: Path, snapshot: Snapshot) -> str:
        partial.mkdir(parents=True, exist_ok=True)
        files: dict[str, WrittenFile] = {}
        for component, tensors in snapshot.tensors.items():
            if component in snapshot.sharded:
                name = f"{component}.rank-{self._rank:04d}.safetensors"
            elif self._rank == 0:
                name = f"{component}.safetensors"
            else:
                raise StateError(f"{component}: not sharded, so rank {self._rank} must not save it")
            files[name] = write_tensors(partial / name, tensors)
        if self._rank != 0:
            return self._report_and_wait(folder, partial, files)
        facts = (json.dumps(snapshot.facts, indent=2, allow_nan=False) + "\n").encode()
        files[FACTS] = write_file(partial / FACTS, [memoryview(facts)])
        for rank in range(1, self._num_ranks):
            files.update(self._await_rank(partial, rank))
        manifest = Manifest(snapshot.facts["global_step"], files)
        self._check()
        write_file(partial / MANIFEST, [manifest.encode()])
        fsync_folder(partial)
        publish(partial, folder)
        return manifest.digest

    def _report_and_wait(self, folder: Path, partial: Path, files: dict[str, WrittenFile]) -> str:
        """Tell rank 0 that this rank's files are durable, and wait until it has published the state."""
        done = partial / f"done.rank-{self._rank:04d}.json"
        draft = done.with_suffix(".draft")
        write_file(draft, [memoryview(json.dumps(files).encode())])
        os.replace(draft, done)
        self._await(lambda: not partial.exists(), f"{partial}: rank 0 did not publish it")
        manifest = read_manifest(folder)
        if any(manifest.files.get(name) != written for name, written in files.items()):
            raise StateError(f"{folder}: rank 0 could not publish this state; see its log")
        return manifest.digest

    def _await_rank(self, partial: Path, rank: int) -> dict[str, WrittenFile]:
        done = partial / f"done.rank-{rank:04d}.json"
        failed = partial / f"failed.rank-{rank:04d}"
        self._await(lambda: done.exists() or failed.exists(), f"{partial}: rank {rank} did not finish")
        if failed.exists():
            raise StateError(f"{partial}: rank {rank} could not save its part; see its log")
        files = {name: WrittenFile(*written) for name, written in json.loads(done.read_text()).items()}
        done.unlink()
        return files

    def _await(self, is_done: Callable[[], bool], problem: str) -> None:
        limit = time.monotonic() + self._wait_seconds
        while not is_done():
            if time.monotonic() > limit:
                raise StateError(f"{problem} within {self._wait_seconds:.0f} s; nothing was published")
            time.sleep(_POLL_SECONDS)
