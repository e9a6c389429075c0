"""The run's ledger: what was trained, saved, skipped and undone, one hash-chained JSON line each.

    {"number": 3, "time": "2026-01-31T12:00:00Z", "event": "chunk_done", "fields": {…}, "previous": …, "hash": …}

`hash` is the SHA-256 of the line without it; `previous` is the hash of the line before, so a changed, lost or swapped
line is found. (Whole lines cut off the end are not: the states' manifests know the last step.) Only the lock holder
appends: one write, one fsync a line. Everything known about chunks is computed from the lines, by pure functions.

A step is named by its global step counted from 1: the state at global step 40 holds steps 1 to 40. `path` is relative
to the run folder. images_trained, applied_updates, busy_seconds: of this chunk, since its start, over all its epochs
and launches, as the state holds them; so steps that were lost or rolled back are in no count.

    event        fields that every such line has (append refuses a line without them; more are allowed)
    started      chunk position_in_run parent chunk_digest plan_digest epochs steps images_planned global_step
                 resumed_from devices; one per launch. steps, images_planned: of all epochs. resumed_from: path or null
    state_saved  chunk path manifest_digest epoch step global_step images_trained applied_updates busy_seconds
    chunk_done   the same; path is the final state
    skipped      chunk epoch step global_step keys reason; reason is `not_finite`, `no_image` or `passed_over`
    broken       chunk epoch step global_step keys reasons; images that failed at run time
    rolled_back  chunk from_global_step global_step path pass_over; pass_over: global steps not to be tried again
    extended     chunk epochs steps images_planned reason; the new totals of a chunk, which is thereby running again
    superseded   chunks reason; these count as never trained (see `chunks_since`)
    stopped      chunk global_step reason; a state was saved, run again
    failed       chunk global_step reason
    recovered    num_bytes text; an unterminated last line that was cut
"""

import errno
import json
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    "rolled_back": ("chunk", "from_global_step", "global_step", "path", "pass_over"),
    "extended": ("chunk", "epochs", "steps", "images_planned", "reason"),
    "superseded": ("chunks", "reason"),
    "stopped": ("chunk", "global_step", "reason"),
    "failed": ("chunk", "global_step", "reason"),
    "recovered": ("num_bytes", "text"),
}  # fmt: skip
"""Every event and the fields that its lines must have."""

_MAY_COME_BEFORE_STARTED = ("started", "superseded", "failed", "stopped", "recovered")


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
        if event in _MAY_COME_BEFORE_STARTED:
            return
        chunk = fields["chunk"]
        if not any(line.event == "started" and line.fields["chunk"] == chunk for line in self._lines):
            raise LedgerError(f"{self.path}: {event!r} for chunk {chunk}, which has no 'started' line")


# --- what the lines say ---


class LastState(NamedTuple):
    """Where a chunk's newest state lies, relative to the run folder, and its global step."""

    path: str
    global_step: int


@dataclass(frozen=True)
class ChunkRecord:
    """What the ledger says about one chunk. Counts are those of its newest state."""

    chunk: str
    position_in_run: int
    """From 0."""
    status: Literal["running", "done", "superseded"]
    epochs: int
    steps: int
    """Planned, over all epochs."""
    images_planned: int
    """Over all epochs."""
    images_trained: int
    skipped: int
    """Steps without an update."""
    broken: int
    """Images that failed at run time, counted in each epoch."""
    chunk_digest: str
    plan_digests: tuple[str, ...]
    """In order of appearance; more than one when batch settings changed between launches."""
    last_state: LastState | None
    seconds: float
    """Of surviving steps."""
    devices: tuple[str, ...]
    """Each launch's, in order, without repeats."""
    parent: str | None
    start_global_step: int
    applied_updates: int


@dataclass(frozen=True)
class Totals:
    """Sums over the chunks that are not superseded, as of the newest state."""

    global_step: int
    images_seen: int
    applied_updates: int
    skipped_steps: int
    broken_images: int
    busy_seconds: float


@dataclass
class _Draft:
    """A chunk while the lines are folded."""

    first: dict[str, Any]
    latest: dict[str, Any]
    """Planned totals: of the last `started` or `extended` line."""
    status: Literal["running", "done", "superseded"] = "running"
    saved: list[dict[str, Any]] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    broken: dict[tuple[int, str], None] = field(default_factory=dict)
    plan_digests: dict[str, None] = field(default_factory=dict)
    devices: dict[str, None] = field(default_factory=dict)

    def go_back_to(self, global_step: int) -> None:
        """Forget what happened after `global_step`: it is trained again from a state of that step."""
        del self.saved[bisect_right(self.saved, global_step, key=lambda fields: fields["global_step"]) :]
        self.skipped = {step for step in self.skipped if step <= global_step}
        self.broken = {entry: None for entry in self.broken if entry[0] <= global_step}

    def record(self) -> ChunkRecord:
        last = self.saved[-1] if self.saved else None
        return ChunkRecord(
            chunk=self.first["chunk"],
            position_in_run=self.first["position_in_run"],
            status=self.status,
            epochs=self.latest["epochs"],
            steps=self.latest["steps"],
            images_planned=self.latest["images_planned"],
            images_trained=last["images_trained"] if last else 0,
            skipped=len(self.skipped),
            broken=len(self.broken),
            chunk_digest=self.first["chunk_digest"],
            plan_digests=tuple(self.plan_digests),
            last_state=LastState(last["path"], last["global_step"]) if last else None,
            seconds=last["busy_seconds"] if last else 0.0,
            devices=tuple(self.devices),
            parent=self.first["parent"],
            start_global_step=self.first["global_step"],
            applied_updates=last["applied_updates"] if last else 0,
        )


def chunk_records(lines: Iterable[Line]) -> dict[str, ChunkRecord]:
    """Return each chunk's record, in the order of their (latest) first start.

    A superseded chunk that started again counts from there. What a launch lost (steps after the state it resumed
    from) and what was rolled back is not in the counts. Raises LedgerError when a line is about an unknown chunk.
    """
    drafts: dict[str, _Draft] = {}
    for line in lines:
        fields = line.fields
        if line.event == "started":
            draft = drafts.get(fields["chunk"])
            if draft is None or draft.status == "superseded":
                drafts.pop(fields["chunk"], None)  # so that the new one stands last
                draft = drafts[fields["chunk"]] = _Draft(first=fields, latest=fields)
            draft.latest = fields
            draft.status = "running"
            draft.plan_digests[fields["plan_digest"]] = None
            draft.devices[fields["devices"]] = None
            draft.go_back_to(fields["global_step"])
        elif line.event == "superseded":
            for chunk in fields["chunks"]:
                _draft_of(drafts, chunk, line).status = "superseded"
        elif line.event not in _MAY_COME_BEFORE_STARTED:
            _apply(_draft_of(drafts, fields["chunk"], line), line.event, fields)
    return {chunk: draft.record() for chunk, draft in drafts.items()}


def _draft_of(drafts: dict[str, _Draft], chunk: str, line: Line) -> _Draft:
    try:
        return drafts[chunk]
    except KeyError:
        raise LedgerError(f"ledger line {line.number + 1}: {line.event!r} for {chunk}, which never started") from None


def _apply(draft: _Draft, event: str, fields: dict[str, Any]) -> None:
    step = fields.get("global_step", 0)
    if event in ("state_saved", "chunk_done"):
        draft.saved = [earlier for earlier in draft.saved if earlier["global_step"] < step] + [fields]
        if event == "chunk_done":
            draft.status = "done"
    elif event == "skipped":
        draft.skipped.add(step)
    elif event == "broken":
        draft.broken.update(((step, key), None) for key in fields["keys"])
    elif event == "rolled_back":
        draft.go_back_to(step)
    elif event == "extended":
        draft.latest = fields
        draft.status = "running"


def parent_of(lines: Sequence[Line], chunk: str) -> str | None:
    """Return the chunk whose final state `chunk` starts from; None: it is the run's first.

    For a chunk that has started: the parent it started from. Otherwise the last done one that is not superseded.
    """
    records = chunk_records(lines)
    if chunk in records and records[chunk].status != "superseded":
        return records[chunk].parent
    done = [record.chunk for record in records.values() if record.status == "done"]
    return done[-1] if done else None


def chunks_since(lines: Iterable[Line], chunk: str) -> list[str]:
    """Return `chunk` and those that started after it: what has to be superseded before it is trained anew."""
    live = [record.chunk for record in chunk_records(lines).values() if record.status != "superseded"]
    return live[live.index(chunk) :] if chunk in live else []


def steps_to_pass_over(lines: Iterable[Line], chunk: str) -> frozenset[int]:
    """Return the global steps that rollbacks of this chunk said not to try again. Not empty: it rolled back before."""
    steps: set[int] = set()
    for line in lines:
        if line.event == "rolled_back" and line.fields["chunk"] == chunk:
            steps.update(line.fields["pass_over"])
        elif line.event == "superseded" and chunk in line.fields["chunks"]:
            steps.clear()
    return frozenset(steps)


def undone_states(lines: Iterable[Line], chunk: str) -> frozenset[str]:
    """Return the manifest digests of the chunk's states that a rollback went behind: nothing starts from them."""
    saved: dict[str, int] = {}
    undone: set[str] = set()
    for line in lines:
        if line.event not in ("state_saved", "chunk_done", "rolled_back") or line.fields["chunk"] != chunk:
            continue
        if line.event == "rolled_back":
            undone |= {digest for digest, step in saved.items() if step > line.fields["global_step"]}
        else:
            saved[line.fields["manifest_digest"]] = line.fields["global_step"]
            undone.discard(line.fields["manifest_digest"])
    return frozenset(undone)


def has_state(lines: Iterable[Line], manifest_digest: str) -> bool:
    """Tell whether a state has its line. One that has none was saved by a launch killed before it could write it:

    append its `state_saved` line from the state's facts before the `started` line of the launch that resumes from it.
    """
    saved = ("state_saved", "chunk_done")
    return any(line.event in saved and line.fields["manifest_digest"] == manifest_digest for line in lines)


def totals(lines: Iterable[Line]) -> Totals:
    """Return the run's counters as its newest state holds them."""
    live = [record for record in chunk_records(lines).values() if record.status != "superseded"]
    last = live[-1] if live else None
    return Totals(
        global_step=0 if last is None else last.last_state.global_step if last.last_state else last.start_global_step,
        images_seen=sum(record.images_trained for record in live),
        applied_updates=sum(record.applied_updates for record in live),
        skipped_steps=sum(record.skipped for record in live),
        broken_images=sum(record.broken for record in live),
        busy_seconds=sum(record.seconds for record in live),
    )
