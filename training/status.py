"""`training status`: what is trained, what remains, how long that takes, and whether a launch is at work. No torch.

Reads only; works while a launch writes, and in a folder that nobody may write to.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from training.campaign import Campaign, read_campaign
from training.chunk_history import ChunkRecord
from training.chunk_records import Totals, totals
from training.config import RunConfig
from training.device_times import device_times, gpu_hours
from training.dreambooth.verdict.report import read_verdict, verdict_lines
from training.ledger import Line
from training.lock import HolderState, holder_state
from training.run_dir import RunDir
from training.stages import epochs_of
from training.status_tables import (
    ChunkCounts,
    StatusRow,
    campaign_counts,
    chunk_rows,
    dataset_rows,
    period_rows,
    render_rows,
)

_RECENT_CHUNKS = 3
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class CurrentChunk:
    """The chunk that is half trained."""

    name: str
    saved_steps: int
    """Of all its epochs, in the newest state."""
    steps_done: int
    """The same, as of the newest row of metrics.jsonl: what a kill now would lose is the difference."""
    steps: int


@dataclass(frozen=True)
class Eta:
    """What is left. Showings count repeats and epochs."""

    showings_left: int
    busy_seconds_per_image: float | None
    """In steps, of the last chunks; None before the first state."""
    seconds_per_image: float | None
    """The same with saves, previews and exports: from the start of a launch's chunk to its end."""

    @property
    def seconds(self) -> float | None:
        """Until all is trained, if it runs without a break."""
        rate = self.seconds_per_image or self.busy_seconds_per_image
        return None if rate is None else rate * self.showings_left


@dataclass(frozen=True)
class Status:
    """Everything that `status` prints."""

    chunks: Sequence[StatusRow]
    images: Sequence[StatusRow]
    periods: Sequence[StatusRow]
    totals: Totals
    next: str | None
    current: CurrentChunk | None
    eta: Eta
    devices: tuple[str, ...]
    gpu_hours: float
    """Of all devices together."""
    live: HolderState | None
    last_exit: Mapping[str, Any] | None
    records: Mapping[str, ChunkRecord]
    verdict: Mapping[str, Any] | None = None
    """verdict.json of a DreamBooth run."""


def read_status(config: RunConfig, root: Path) -> Status:
    """Read how far a run is; one that was never launched is at its start. Raises ChunkError, LedgerError."""
    run_dir = RunDir(root)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    counts, sums = campaign_counts(campaign, run_dir), totals(campaign.lines)
    records = campaign.records
    return Status(
        chunks=chunk_rows(campaign),
        images=dataset_rows(campaign, counts),
        periods=period_rows(campaign, counts),
        totals=sums,
        next=campaign.next,
        current=current_chunk(campaign, run_dir),
        eta=eta_of(campaign, counts),
        devices=tuple(dict.fromkeys(name for record in records.values() for name in record.devices)),
        gpu_hours=gpu_hours(device_times(campaign.lines)),
        live=holder_state(run_dir.lock_path),
        last_exit=run_dir.read_last_exit(),
        records=records,
        verdict=read_verdict(root),
    )


def current_chunk(campaign: Campaign, run_dir: RunDir) -> CurrentChunk | None:
    """Return the chunk that is half trained, and how far it is; None when there is none."""
    record = campaign.records.get(campaign.next or "")
    if record is None or record.status != "running":
        return None
    visit = record.visits[-1]
    saved = record.last_state.global_step if record.last_state is not None else visit.global_step
    done_before = record.steps * visit.first_epoch // record.epochs
    row = _last_row(run_dir.metrics_path)
    reached = row["global_step"] if row is not None and row.get("chunk") == record.chunk else saved
    saved_steps, steps_done = (max(step - visit.global_step, 0) + done_before for step in (saved, max(reached, saved)))
    return CurrentChunk(record.chunk, saved_steps=saved_steps, steps_done=steps_done, steps=record.steps)


def _last_row(path: Path) -> dict[str, Any] | None:
    """Return the last whole row of metrics.jsonl without reading the rest."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            whole = stream.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return None
    try:
        row: dict[str, Any] = json.loads(whole.rpartition(b"\n")[2])
    except ValueError:
        return None  # a row longer than the tail, or none yet
    return row


def eta_of(campaign: Campaign, counts: Mapping[str, ChunkCounts]) -> Eta:
    """Return what is left to show. counts: of each chunk that is not done; only showings matter."""
    left = 0
    for name in campaign.names:
        record = campaign.records.get(name)
        if campaign.is_done(name):
            continue
        planned, seen = counts[name].showings * campaign.epochs(name), 0
        if record is not None and record.status != "superseded":
            planned = record.images_planned * campaign.epochs(name) // record.epochs
            seen = record.images_trained
        left += max(planned - seen, 0)
    recent = sorted(
        (record for record in campaign.records.values() if record.images_trained and record.last_state is not None),
        key=lambda record: record.last_state.global_step if record.last_state is not None else 0,
    )[-_RECENT_CHUNKS:]
    num_images = sum(record.images_trained for record in recent)
    busy = sum(record.seconds for record in recent) / num_images if num_images else None
    return Eta(left, busy, _seconds_per_image(campaign.lines))


def _seconds_per_image(lines: Sequence[Line]) -> float | None:
    """Return wall seconds per image of the last launches that ended a chunk, from `started` to `chunk_done`."""
    spans: list[tuple[float, int]] = []
    saved: dict[tuple[str, int], int] = {}
    begun = ("", 0.0, 0)
    for line in lines:
        chunk, step = line.fields.get("chunk", ""), line.fields.get("global_step", 0)
        if line.event == "started":
            begun = (chunk, _seconds(line), saved.get((chunk, step), 0))
        elif line.event in ("state_saved", "chunk_done"):
            saved[chunk, step] = images = line.fields["images_trained"]
            if line.event == "chunk_done" and begun[0] == chunk and images > begun[2]:
                spans.append((_seconds(line) - begun[1], images - begun[2]))
    recent = spans[-_RECENT_CHUNKS:]
    seconds, images = (sum(column) for column in zip(*recent, strict=True)) if recent else (0.0, 0)
    return seconds / images if images and seconds > 0 else None


def _seconds(line: Line) -> float:
    return datetime.fromisoformat(line.time).timestamp()


# --- as text and JSON ---


def status_text(status: Status, *, now: float | None = None) -> str:
    """Return the tables, what is next, the time it takes, and who is at work. now: seconds since 1970, UTC."""
    sums, eta = status.totals, status.eta
    lines = [
        f"GPU used for training: {', '.join(status.devices) or 'none yet'}",
        f"GPU hours: {status.gpu_hours:,.2f}",
        "",
        render_rows("chunks of", "chunks", status.chunks),
        "",
        render_rows("data set", "images", status.images),
        "",
        render_rows("period", "images", status.periods),
        "",
        f"global step {sums.global_step:,}  updates {sums.applied_updates:,}  images {sums.images_seen:,}  "
        f"skipped steps {sums.skipped_steps:,}  broken images {sums.broken_images:,}",
    ]
    lines.append(_eta_text(eta, now=time.time() if now is None else now))
    lines.append(_next_text(status))
    lines += verdict_lines(status.verdict) if status.verdict is not None else ()
    lines.append(f"launch: {status.live if status.live is not None else 'none is running'}")
    if status.last_exit is not None:
        last = status.last_exit
        lines.append(
            f"last exit code: {last.get('code')} ({last.get('time')}, {last.get('host')}, chunk {last.get('chunk')})"
        )
    return "\n".join(lines)


def _eta_text(eta: Eta, *, now: float) -> str:
    if eta.showings_left == 0:
        return "nothing is left to train"
    if eta.seconds is None:
        return f"{eta.showings_left:,} images left to show; how long that takes is known after the first saved state"
    ends = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now + eta.seconds))
    busy = eta.busy_seconds_per_image or 0.0
    whole = f", {eta.seconds_per_image:.3g} s with saves and previews" if eta.seconds_per_image is not None else ""
    return (
        f"{eta.showings_left:,} images left to show, {busy:.3g} s each{whole}: {duration_text(eta.seconds)}, "
        f"until {ends} UTC if it runs without a break"
    )


def duration_text(seconds: float) -> str:
    """Return a time as people say it: `45 s`, `3 h 07 m`, `12 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60:02d} m" if hours else f"{minutes % 60} m"


def _next_text(status: Status) -> str:
    current = status.current
    if status.next is None:
        return "all chunks are done"
    if current is None:
        return f"next: {status.next}, not started"
    share = current.steps_done / current.steps if current.steps else 0.0
    return (
        f"next: {current.name}, half trained: step {current.steps_done:,} of {current.steps:,} ({share:.0%}), "
        f"saved up to step {current.saved_steps:,}"
    )


def status_json(status: Status) -> str:
    """Return the same as one JSON object."""
    values = asdict(status)
    values["eta"]["seconds"] = status.eta.seconds
    return json.dumps(values, indent=2)
