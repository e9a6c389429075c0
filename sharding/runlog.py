"""What people and programs see of a running stage: log lines, events.jsonl, a progress line.

Logging is configured only by a CLI (`configure_logging`). Progress is a bar on a terminal and one line per
`EVERY_SECONDS` otherwise.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from sharding.files import naming_full_disk

EVERY_SECONDS = 30.0


def configure_logging(*, rank: int = 0, verbose: bool = False) -> None:
    """Send log lines to stderr: rank 0 at INFO (DEBUG if verbose), other ranks at WARNING."""
    level = logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(name)s  %(message)s", stream=sys.stderr, force=True)
    for noisy in ("PIL", "urllib3", "filelock", "numba", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line in one write; safe for several processes on a local disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with naming_full_disk(path):
            os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class EventLog:
    """Append events, one JSON line each, with the time and the stage they belong to."""

    def __init__(self, path: Path, *, stage: str) -> None:
        self.path = path
        self.stage = stage

    def write(self, event: str, **fields: Any) -> None:
        """Append {time, stage, event, …fields}. Times are for people; nothing is derived from them."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append_line(self.path, {"time": now, "stage": self.stage, "event": event, **fields})


class Progress:
    """Show how far a stage is: a bar on a terminal, a log line every EVERY_SECONDS otherwise.

    Use as a context manager; call `advance(n)`; `note(**facts)` sets what stands behind the bar.
    """

    def __init__(self, total: int, *, unit: str, title: str) -> None:
        self.total = total
        self.unit = unit
        self.title = title
        self.done = 0
        self._facts: dict[str, Any] = {}
        self._started = self._last_line = time.monotonic()
        self._logger = logging.getLogger(__name__)
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, unit=self.unit, desc=self.title, dynamic_ncols=True, leave=False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, **facts: Any) -> None:
        """Set facts shown behind the counts, for example `waiting="3%"`."""
        self._facts.update(facts)
        if self._bar is not None:
            self._bar.set_postfix(self._facts, refresh=False)

    def skip(self, count: int) -> None:
        """Take `count` units out of the total: there is nothing to do for them, so they say nothing about speed."""
        self.total -= count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_line >= EVERY_SECONDS:
            self._last_line = now
            rate = self.done / max(now - self._started, 1e-9)
            eta_seconds = (self.total - self.done) / max(rate, 1e-9)
            facts = "".join(f" {name} {value}" for name, value in self._facts.items())
            self._logger.info(
                "%s  %s of %s %s  %.1f/s  eta %dm%02ds%s",
                self.title, f"{self.done:,}", f"{self.total:,}", self.unit, rate,
                eta_seconds // 60, eta_seconds % 60, facts,
            )  # fmt: skip
