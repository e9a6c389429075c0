"""A line of the ledger in words, for `status --watch` and the dashboard. Pure."""

from collections.abc import Callable, Mapping
from typing import Any

from training.ledger import Line


def event_text(line: Line) -> str:
    """Return what the line says, without its time: `newest/0005: done at global step 1,024, 8,000 images`."""
    fields = line.fields
    chunk = f"{fields['chunk']}: " if "chunk" in fields else ""
    words = _WORDS[line.event](fields) if line.event in _WORDS else line.event
    return f"{chunk}{words}"


def _step(fields: Mapping[str, Any]) -> str:
    return f"global step {fields.get('global_step', 0):,}"


def _images(fields: Mapping[str, Any]) -> str:
    return f"{fields.get('images_trained', 0):,} images"


def _started(fields: Mapping[str, Any]) -> str:
    if fields.get("resumed_from"):
        return f"started at {_step(fields)} from {fields['resumed_from']}, {fields.get('devices')}"
    return f"started at {_step(fields)}, {fields.get('devices')}"


def _broken(fields: Mapping[str, Any]) -> str:
    keys = fields.get("keys", [])
    return f"{len(keys):,} broken images at {_step(fields)}, first {keys[0]}" if keys else f"broken at {_step(fields)}"


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "started": _started,
    "state_saved": lambda fields: f"state saved at {_step(fields)}, {_images(fields)}",
    "chunk_done": lambda fields: f"done at {_step(fields)}, {_images(fields)}",
    "skipped": lambda fields: f"{_step(fields)} skipped: {fields.get('reason')}",
    "broken": _broken,
    "rolled_back": lambda fields: (
        f"rolled back from {fields.get('from_global_step', 0):,} to {_step(fields)}: {fields.get('reason')}"
    ),
    "extended": lambda fields: f"extended: {fields.get('reason')}",
    "superseded": lambda fields: f"{len(fields.get('chunks', [])):,} chunks superseded: {fields.get('reason')}",
    "stopped": lambda fields: f"stopped at {_step(fields)}: {fields.get('reason')}",
    "failed": lambda fields: f"failed at {_step(fields)}: {fields.get('reason')}",
    "recovered": lambda fields: f"an unterminated ledger line of {fields.get('num_bytes', 0):,} bytes was cut",
    "rewound": lambda fields: f"back at {_step(fields)}; what was undone lies in {fields.get('path')}",
    "forked": lambda fields: f"a branch of {fields.get('source')} begins here, at {_step(fields)}",
    "imported": lambda fields: f"the state of another trainer was imported: {fields.get('source')}",
}
