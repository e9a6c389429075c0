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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sharding.files import TEMPORARY_MARK, free_bytes, fsync_folder, require_free_bytes, size_text
from training.kept_states import being_written, publish, retain
from training.state_manifest import FACTS, MANIFEST, Manifest, StateError
from training.tensor_file import WrittenFile, write_file, write_tensors
from training.tensor_parts import InParts, brought_together

logger = logging.getLogger(__name__)


# --- a snapshot ---


@dataclass(frozen=True)
class Snapshot:
    """A state's copy on the CPU. Owned by the saver from `save` on."""

    tensors: dict[str, dict[str, Tensor]]
    """{component: {name: contiguous CPU tensor}}."""
    facts: dict[str, Any]
    """JSON-able; holds the integer `global_step`."""


def take_snapshot(tensors: Mapping[str, Mapping[str, Tensor | InParts]], facts: Mapping[str, Any]) -> Snapshot:
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
    return Snapshot(copies, own_facts)


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
    require_free_bytes(folder, num_states * num_bytes, f"{num_states} more states of {size_text(num_bytes)}")
    return (
        f"a state takes {size_text(num_bytes)} on disk and as much memory while it is saved; "
        f"up to {keep_last + 1} at a time, {size_text(free_bytes(folder))} free for {folder}"
    )


# --- saving ---


class StateSaver:
    """Save states one at a time, in the background or at once: rank 0's; the others help to take the snapshot.

    check: raises when this process may no longer write (`RunLock.check`); called before writing and before publishing.
    on_saved(folder, manifest digest): called on the caller's thread, by `poll`, `drain` or the next `save`, when the
    state is durable: there the ledger gets its line.
    keep_last: remove older `state-*` beside a new one once it is durable, on the writer's thread; None: remove nothing.
    """

    def __init__(
        self,
        *,
        asynchronous: bool,
        check: Callable[[], None],
        on_saved: Callable[[Path, str], None] | None = None,
        keep_last: int | None = None,
    ) -> None:
        self.trusted: set[str] = set()
        """Digests of states that need not be read again to know that they verify; those saved here are added."""
        self._asynchronous = asynchronous
        self._check = check
        self._on_saved = on_saved
        self._keep_last = keep_last
        self._thread: threading.Thread | None = None
        self._published: tuple[Path, str] | None = None
        self._error: BaseException | None = None

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """Drain the save before, then write `snapshot` as `folder`; returns at once when asynchronous.

        Raises what the save before or, when not asynchronous, this one raised.
        """
        self.drain()
        self._check()
        partial = folder.with_name(f"{folder.name}{TEMPORARY_MARK}{os.getpid()}")
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
            if self._on_saved is not None:
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
            if self._keep_last is not None:
                retain(folder.parent, keep_last=self._keep_last, trusted=self.trusted)
        except BaseException as error:  # handed to the caller's thread by drain
            self._error = error
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            being_written.discard(partial)

    def _write(self, folder: Path, partial: Path, snapshot: Snapshot) -> str:
        partial.mkdir(parents=True, exist_ok=True)
        files: dict[str, WrittenFile] = {}
        for component, tensors in snapshot.tensors.items():
            name = f"{component}.safetensors"
            files[name] = write_tensors(partial / name, tensors)
        facts = (json.dumps(snapshot.facts, indent=2, allow_nan=False) + "\n").encode()
        files[FACTS] = write_file(partial / FACTS, [memoryview(facts)])
        manifest = Manifest(snapshot.facts["global_step"], files)
        self._check()
        write_file(partial / MANIFEST, [manifest.encode()])
        fsync_folder(partial)
        publish(partial, folder)
        return manifest.digest
