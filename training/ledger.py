"""The run's ledger: what was trained, saved, skipped and undone, one hash-chained JSON line each.

    {"number": 3, "time": "2026-01-31T12:00:00Z", "event": "chunk_done", "fields": {…}, "previous": …, "hash": …}

`hash` is the SHA-256 of the line without it; `previous` is the hash of the line before, so a changed, lost or swapped
line is found. (Whole lines cut off the end are not: the states' manifests know the last step.) Only the lock holder
appends: one write, one fsync a line. What the lines say about chunks is computed in `training.chunk_records`.

A step is named by its global step counted from 1: the state at global step 40 holds steps 1 to 40. `path` is relative
to the run folder. images_trained, applied_updates, busy_seconds: of this chunk, since its start, over all its epochs
and launches, as the state holds them; so steps that were lost or rolled back are in no count.

    event        fields that every such line has (append refuses a line without them; more are allowed)
    started      chunk position_in_run parent chunk_digest plan_digest epochs steps images_planned global_step
                 resumed_from devices; one per launch. steps, images_planned: of all epochs. resumed_from: path or null.
                 After the chunk's `chunk_done`: it is trained again, in epochs from its former `epochs` on
    state_saved  chunk path manifest_digest epoch step global_step images_trained applied_updates busy_seconds
    chunk_done   the same; path is the final state
    skipped      chunk epoch step global_step keys reason; reason is `not_finite`, `no_image` or `passed_over`
    broken       chunk epoch step global_step keys reasons; images that failed at run time
    rolled_back  chunk from_global_step global_step path pass_over reason; pass_over: global steps not to be tried
                 again; reason is `not_finite` or `loss_spike`
    extended     epochs chunks global_step reason; of the run: the new number of epochs, and the chunks appended
    superseded   chunks reason; these count as never trained. With `after_line`, of a rewind: nothing after that line
                 counts, so a chunk that was trained before it, too, is what it was then; global_step: of that line;
                 moved_to: the folder that their files are moved into
    rewound      path global_step; all of that is moved, see `training.set_aside`
    forked       run_id source chunk path manifest_digest global_step settings changed; the lines before are another
                 run's up to its `chunk_done` of `chunk`, see `training.fork`. settings: that run's; changed: by key
    stopped      chunk global_step reason; a state was saved, run again
    failed       chunk global_step reason
    recovered    num_bytes text; an unterminated last line that was cut
    imported     path manifest_digest global_step source; of the run, before its first chunk: the state that it starts
                 from was made by another trainer (`training.kohya.import_state`)
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.files import DiskFullError, digest_of, fsync_folder

logger = logging.getLogger(__name__)

_FIRST = "0" * 64
_COUNTS = ("images_trained", "applied_updates", "busy_seconds")
_SAVED = ("chunk", "path", "manifest_digest", "epoch", "step", "global_step", *_COUNTS)

EVENTS: dict[str, tuple[str, ...]] = {
    "started": (
        "chunk", "position_in_run", "parent", "chunk_digest", "plan_digest", "epochs", "steps", "images_planned",
        "global_step", "resumed_from", "devices",
    ),
    "state_saved": _SAVED,
    "chunk_done": _SAVED,
    "skipped": ("chunk", "epoch", "step", "global_step", "keys", "reason"),
    "broken": ("chunk", "epoch", "step", "global_step", "keys", "reasons"),
    "rolled_back": ("chunk", "from_global_step", "global_step", "path", "pass_over", "reason"),
    "extended": ("epochs", "chunks", "global_step", "reason"),
    "superseded": ("chunks", "reason"),
    "rewound": ("path", "global_step"),
    "forked": ("run_id", "source", "chunk", "path", "manifest_digest", "global_step", "settings", "changed"),
    "stopped": ("chunk", "global_step", "reason"),
    "failed": ("chunk", "global_step", "reason"),
    "recovered": ("num_bytes", "text"),
    "imported": ("path", "manifest_digest", "global_step", "source"),
}  # fmt: skip
"""Every event and the fields that its lines must have."""

MAY_COME_BEFORE_STARTED = (
    "started", "extended", "superseded", "rewound", "forked", "failed", "stopped", "recovered", "imported",
)  # fmt: skip
"""Lines that may be about a chunk that has no `started` line, or about none."""


class LedgerError(ValueError):
    """The ledger is damaged or a line does not fit it; the message names the line."""


@dataclass(frozen=True)
class Line:
    """One line. number: from 0. time: UTC, for people only. previous, hash: 64 hex digits."""

    number: int
    time: str
    event: str
    fields: dict[str, Any]
    previous: str
    hash: str


def _make_line(number: int, when: str, event: str, fields: dict[str, Any], previous: str) -> Line:
    body = {"number": number, "time": when, "event": event, "fields": fields, "previous": previous}
    return Line(hash=digest_of(body), **body)  # type: ignore[arg-type]


def _encode(line: Line) -> bytes:
    return (json.dumps(vars(line), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parse(path: Path, data: bytes) -> tuple[list[Line], bytes]:
    """Return the verified lines and the unterminated rest (b"" normally)."""
    *complete, rest = data.split(b"\n")
    lines: list[Line] = []
    previous = _FIRST
    for number, raw in enumerate(complete):
        where = f"{path}: line {number + 1}"
        try:
            value = json.loads(raw)
            line = Line(**value)
            again = _make_line(line.number, line.time, line.event, line.fields, line.previous)
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{where}: not a ledger line ({error}); restore the file from a copy") from error
        if line.number != number or line.previous != previous:
            raise LedgerError(f"{where}: does not follow the line before: a line was removed, added or moved")
        if again.hash != line.hash or _encode(line) != raw + b"\n":
            raise LedgerError(f"{where}: changed after it was written: its hash does not fit; restore the file")
        lines.append(line)
        previous = line.hash
    return lines, rest


def read_ledger(path: Path) -> list[Line]:
    """Read and verify a ledger; no file is an empty one. An unterminated last line (being written) is left out.

    Raises LedgerError, naming the line, for any other break in the chain.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return _parse(path, data)[0]


class Ledger:
    """The ledger of the process that holds the run's lock. Make one with `Ledger.open`."""

    def __init__(self, path: Path, lines: Iterable[Line], *, guard: Callable[[], None]) -> None:
        self.path = path
        self._lines = list(lines)
        self._guard = guard
        self._num_bytes = sum(len(_encode(line)) for line in self._lines)

    @classmethod
    def open(cls, path: Path, *, guard: Callable[[], None]) -> "Ledger":
        """Verify the file (created when missing) and cut an unterminated last line, which is reported as a line.

        guard: raises when this process may no longer write (`RunLock.check`); called before every write.
        A line is acknowledged only after its fsync, so nobody has acted on one that is cut.
        """
        guard()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            lines, rest = _parse(path, path.read_bytes())
            ledger = cls(path, lines, guard=guard)
            if rest:
                os.ftruncate(descriptor, ledger._num_bytes)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fsync_folder(path.parent)
        if rest:
            logger.warning(
                "%s: cut an unterminated last line of %d bytes (a writer was killed while writing)", path, len(rest)
            )
            ledger.append("recovered", num_bytes=len(rest), text=rest[:200].decode(errors="replace"))
        return ledger

    @property
    def lines(self) -> tuple[Line, ...]:
        """All lines, oldest first."""
        return tuple(self._lines)

    def append(self, event: str, **fields: Any) -> Line:
        """Append one line durably and return it.

        Raises LedgerError for an unknown event, a missing field, a chunk that never started, or when the file is not
        as this process left it; what `guard` raises; DiskFullError. After an error the file is as before.
        """
        self._guard()
        self._require_fits(event, fields)
        previous = self._lines[-1].hash if self._lines else _FIRST
        fields = json.loads(json.dumps(fields, allow_nan=False))  # tuples become lists, as they will be when read
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = _make_line(len(self._lines), now, event, fields, previous)
        data = _encode(line)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            if (num_bytes := os.fstat(descriptor).st_size) != self._num_bytes:
                raise LedgerError(
                    f"{self.path}: {num_bytes:,} bytes, {self._num_bytes:,} were written by this process: "
                    "another program wrote to it; nothing was appended"
                )
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, self._num_bytes)
                if error.errno == errno.ENOSPC:
                    raise DiskFullError(errno.ENOSPC, f"disk full while appending to {self.path}") from error
                raise
        finally:
            os.close(descriptor)
        self._lines.append(line)
        self._num_bytes += len(data)
        return line

    def _require_fits(self, event: str, fields: dict[str, Any]) -> None:
        if event not in EVENTS:
            raise LedgerError(f"{self.path}: unknown event {event!r}; events are {', '.join(EVENTS)}")
        if missing := [name for name in EVENTS[event] if name not in fields]:
            raise LedgerError(f"{self.path}: a {event!r} line needs {', '.join(missing)}")
        if event in MAY_COME_BEFORE_STARTED:
            return
        chunk = fields["chunk"]
        if not any(line.event == "started" and line.fields["chunk"] == chunk for line in self._lines):
            raise LedgerError(f"{self.path}: {event!r} for chunk {chunk}, which has no 'started' line")
