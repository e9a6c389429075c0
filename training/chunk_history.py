"""One chunk in the ledger: what its lines, folded one after the other, say happened to it.

What a launch lost (steps after the state it resumed from) and what was rolled back is taken out again. Pure functions
of the lines; what follows from all chunks together is in `training.chunk_records`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from training.ledger import MAY_COME_BEFORE_STARTED, LedgerError, Line

Status = Literal["running", "done", "superseded"]


class LastState(NamedTuple):
    """Where a chunk's newest state lies, relative to the run folder, and its global step."""

    path: str
    global_step: int


class Visit(NamedTuple):
    """The run trains a chunk from its first epoch to its last: one visit. Each time that the run is extended by more
    epochs, and the chunk's turn comes again, it is another one."""

    first_epoch: int
    global_step: int
    """Of the state that it starts from."""
    parent: str | None
    """The chunk whose final state that is; None: the weights that the config names."""


@dataclass(frozen=True)
class ChunkRecord:
    """What the ledger says about one chunk. Counts are those of its newest state."""

    chunk: str
    position_in_run: int
    """From 0."""
    status: Status
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
    """Of epoch 0, in order of appearance; more than one when batch settings changed between launches."""
    last_state: LastState | None
    seconds: float
    """Of surviving steps."""
    devices: tuple[str, ...]
    """Each launch's, in order, without repeats."""
    parent: str | None
    """Of the latest visit."""
    start_global_step: int
    """Of the first visit."""
    applied_updates: int
    visits: tuple[Visit, ...] = ()

    def is_done(self, epochs: int) -> bool:
        """Tell whether all of so many epochs are trained."""
        return self.status == "done" and self.epochs >= epochs


@dataclass
class History:
    """A chunk while the lines are folded; at the end the fields of the lines that still hold, by global step."""

    first: dict[str, Any]
    latest: dict[str, Any]
    """Of the last `started` line: it has the planned totals."""
    visits: list[Visit]
    starts: list[dict[str, Any]] = field(default_factory=list)
    """All `started` lines."""
    status: Status = "running"
    saved: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[int, dict[str, Any]] = field(default_factory=dict)
    broken: dict[int, dict[str, Any]] = field(default_factory=dict)
    plan_digests: dict[str, None] = field(default_factory=dict)
    devices: dict[str, None] = field(default_factory=dict)

    def start(self, fields: dict[str, Any]) -> None:
        """Take a `started` line: this launch goes on from its global step."""
        if self.status == "done":
            self.visits.append(Visit(self.latest["epochs"], fields["global_step"], fields["parent"]))
        self.latest, self.status = fields, "running"
        self.starts.append(fields)
        self.plan_digests[fields["plan_digest"]] = None
        self.devices[fields["devices"]] = None
        self.go_back_to(fields["global_step"])

    def go_back_to(self, global_step: int) -> None:
        """Forget what happened after `global_step`: it is trained again from a state of that step."""
        del self.saved[bisect_right(self.saved, global_step, key=lambda fields: fields["global_step"]) :]
        self.skipped = {step: fields for step, fields in self.skipped.items() if step <= global_step}
        self.broken = {step: fields for step, fields in self.broken.items() if step <= global_step}

    def apply(self, event: str, fields: dict[str, Any]) -> None:
        """Take any other line about the chunk."""
        step = fields.get("global_step", 0)
        if event in ("state_saved", "chunk_done"):
            self.saved = [earlier for earlier in self.saved if earlier["global_step"] < step] + [fields]
            if event == "chunk_done":
                self.status = "done"
        elif event == "skipped":
            self.skipped[step] = fields
        elif event == "broken":
            self.broken[step] = fields
        elif event == "rolled_back":
            self.go_back_to(step)

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
            broken=sum(len(fields["keys"]) for fields in self.broken.values()),
            chunk_digest=self.first["chunk_digest"],
            plan_digests=tuple(self.plan_digests),
            last_state=LastState(last["path"], last["global_step"]) if last else None,
            seconds=last["busy_seconds"] if last else 0.0,
            devices=tuple(self.devices),
            parent=self.visits[-1].parent,
            start_global_step=self.first["global_step"],
            applied_updates=last["applied_updates"] if last else 0,
            visits=tuple(self.visits),
        )


def histories(lines: Iterable[Line]) -> dict[str, History]:
    """Fold the lines, chunk by chunk, in the order of their (latest) first start. Raises as `chunk_records`."""
    lines, found = list(lines), dict[str, History]()
    for line in lines:
        fields = line.fields
        if line.event == "started":
            chunk = fields["chunk"]
            if chunk not in found or found[chunk].status == "superseded":
                found.pop(chunk, None)  # so that the new one stands last
                found[chunk] = History(fields, fields, [Visit(0, fields["global_step"], fields["parent"])])
            found[chunk].start(fields)
        elif line.event == "superseded":
            _supersede(found, line, before=histories(lines[: fields.get("after_line", -1) + 1]))
        elif line.event not in MAY_COME_BEFORE_STARTED:
            _history_of(found, fields["chunk"], line).apply(line.event, fields)
    return found


def _supersede(found: dict[str, History], line: Line, *, before: Mapping[str, History]) -> None:
    """Undo chunks. before: what they were after the line that the run went back to."""
    for chunk in line.fields["chunks"]:
        if chunk in before and before[chunk].status == "done":
            found[chunk] = before[chunk]  # trained in earlier epochs then, and again since
        else:
            _history_of(found, chunk, line).status = "superseded"


def _history_of(found: dict[str, History], chunk: str, line: Line) -> History:
    try:
        return found[chunk]
    except KeyError:
        raise LedgerError(f"ledger line {line.number + 1}: {line.event!r} for {chunk}, which never started") from None
