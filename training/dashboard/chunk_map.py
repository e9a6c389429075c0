"""Every chunk of a run as a square: in which state it is and what is known about it. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from training.campaign import Campaign
from training.chunk_history import ChunkRecord
from training.ledger import Line

State = Literal["done", "running", "half", "failed", "superseded", "waiting"]
"""half: trained in part, and no launch is at it."""


@dataclass
class _Seen:
    """What the ledger's lines say beyond the record of a chunk."""

    first_start: str | None = None
    end: str | None = None
    num_launches: int = 0
    num_rolled_back: int = 0
    last_event: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Square:
    """One chunk. facts: title → text, in the order in which they are shown."""

    name: str
    state: State
    done_fraction: float
    facts: Mapping[str, str] = field(default_factory=dict)


def chunk_map(campaign: Campaign, *, live_chunk: str | None, losses: Mapping[str, float | None]) -> list[Square]:
    """Return the squares in the order of the run. live_chunk: what a launch is at work on; losses: means by chunk."""
    seen = _seen(campaign.lines)
    squares = []
    for name in campaign.names:
        record, events = campaign.records.get(name), seen.get(name, _Seen())
        state = _state(name, campaign, record, events, is_live=name == live_chunk)
        done = 0.0
        if record is not None and state != "superseded":
            planned = record.images_planned / max(record.epochs, 1) * campaign.epochs(name)
            done = 1.0 if state == "done" else min(record.images_trained / max(planned, 1), 1.0)
        squares.append(Square(name, state, done, _facts(record, events, losses.get(name))))
    return squares


def _state(name: str, campaign: Campaign, record: ChunkRecord | None, seen: _Seen, *, is_live: bool) -> State:
    if is_live:
        return "running"
    if seen.last_event == "failed":
        return "failed"
    if record is None:
        return "waiting"
    if record.status == "superseded":
        return "superseded"
    return "done" if campaign.is_done(name) else "half"


def _seen(lines: Iterable[Line]) -> dict[str, _Seen]:
    found: dict[str, _Seen] = {}
    for line in lines:
        fields = line.fields
        for chunk in fields.get("chunks", ()) if line.event == "superseded" else (fields.get("chunk"),):
            if chunk is None:
                continue
            seen = found.setdefault(chunk, _Seen())
            if line.event == "started":
                seen.first_start, seen.end = seen.first_start or line.time, None
                seen.num_launches += 1
            elif line.event == "chunk_done":
                seen.end = line.time
            elif line.event == "rolled_back":
                seen.num_rolled_back += 1
            seen.last_event, seen.reason = line.event, str(fields.get("reason", ""))
    return found


def _facts(record: ChunkRecord | None, seen: _Seen, loss: float | None) -> dict[str, str]:
    if record is None:
        return {"failed": seen.reason} if seen.last_event == "failed" else {}
    last = record.last_state.global_step if record.last_state is not None else record.start_global_step
    facts = {
        "images": f"{record.images_trained:,} of {record.images_planned:,}",
        "global steps": f"{record.start_global_step + 1:,} to {last:,}" if last > record.start_global_step else "none",
        "epochs": f"{record.epochs:,}" if record.epochs > 1 else "",
        "mean loss": f"{loss:.4f}" if loss is not None else "",
        "time in steps": f"{record.seconds / 3600:.2f} h" if record.seconds else "",
        "speed": f"{record.images_trained / record.seconds:.1f} images/s" if record.seconds else "",
        "started": _when(seen.first_start),
        "ended": _when(seen.end),
        "launches": f"{seen.num_launches:,}",
        "skipped steps": f"{record.skipped:,}" if record.skipped else "",
        "broken images": f"{record.broken:,}" if record.broken else "",
        "rolled back": f"{seen.num_rolled_back:,} times" if seen.num_rolled_back else "",
        seen.last_event: seen.reason if seen.last_event in ("failed", "stopped", "superseded") else "",
        "on": ", ".join(record.devices),
    }
    return {title: text for title, text in facts.items() if text}


def _when(time: str | None) -> str:
    return time.replace("T", " ").replace("Z", " UTC") if time else ""


def groups(squares: Sequence[Square]) -> list[dict[str, Any]]:
    """Return the squares by the folder their chunks are in, which is the dataset, in the order of the run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for square in squares:
        shown = {"name": square.name, "state": square.state, "fraction": round(square.done_fraction, 3)}
        found.setdefault(square.name.split("/")[0], []).append(shown | {"facts": dict(square.facts)})
    return [{"name": name, "chunks": chunks} for name, chunks in found.items()]
