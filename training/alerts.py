"""Tell people at once what they would want to know at 3 a.m.: a webhook gets a JSON POST, W&B an alert. Rank 0 only.

    {"kind": "spike", "run": "sote-3b", "chunk": "newest/0005", "step": 41216, "what": "loss spike: …", "time": …,
     "host": …, "text": "sote-3b newest/0005 step 41,216: loss spike: …"}

A thread sends; training never waits for it. The same cause is told once per launch, and of one kind at most one alert
in ten minutes: those in between are counted in the next. What cannot be delivered is logged once. No torch.
"""

import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sharding.config import ConfigError
from sharding.files import free_bytes, size_text
from training.config.watching import TrackerConfig
from training.position import Position
from training.spikes import Spike
from training.step_report import StepReport

logger = logging.getLogger(__name__)

WEBHOOK_VARIABLE = "CHUNKLINE_WEBHOOK"
TIMEOUT_SECONDS = 5.0
_KIND_SECONDS = 600.0
_LAST_WAIT_SECONDS = TIMEOUT_SECONDS + 1
_WHAT_LENGTH = 500

Kind = Literal["not_finite", "spike", "stalled_data", "low_disk", "failed", "campaign_done"]


@dataclass(frozen=True)
class Alert:
    """One thing to tell. step: global step, counted from 1; None before there is one."""

    kind: Kind
    run: str
    chunk: str | None
    step: int | None
    what: str

    @property
    def text(self) -> str:
        """All of it in a line."""
        place = " ".join(filter(None, (self.run, self.chunk, f"step {self.step:,}" if self.step is not None else "")))
        return f"{place}: {self.what}"


Send = Callable[[Alert], None]


class Alerts:
    """See the module. settings: of the run's [trackers]; run: its name. Without anyone to tell it does nothing.

    Raises ConfigError for a webhook that is no web address.
    """

    def __init__(
        self, settings: TrackerConfig, *, run: str, clock: Callable[[], float] = time.monotonic, is_main: bool = True
    ) -> None:
        self._settings = settings
        self._run = run
        self._clock = clock
        self._is_main = is_main
        self._senders: dict[str, Send] = {}
        self._told: set[tuple[str, str]] = set()
        self._last: dict[str, float] = {}
        self._held_back: dict[str, int] = {}
        self._num_stalled = 0
        self._is_disk_low = False
        self._failing: set[str] = set()
        self._queue: queue.SimpleQueue[Alert | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if url := settings.webhook or os.environ.get(WEBHOOK_VARIABLE, ""):
            if urlsplit(url).scheme not in ("http", "https"):
                raise ConfigError(f"{WEBHOOK_VARIABLE}: must begin with https:// or http://")
            self.also_to("webhook", lambda alert: post(url, alert))

    def also_to(self, name: str, send: Send) -> None:
        """Tell `send`, too, from the alerts' own thread; what it raises is logged once."""
        if self._is_main:
            self._senders[name] = send

    def tell(self, kind: Kind, what: str, *, chunk: str | None, step: int | None, cause: str) -> None:
        """Tell a thing once per launch and cause; of one kind not more than one in ten minutes."""
        if not self._senders or (kind, cause) in self._told:
            return
        self._told.add((kind, cause))
        now = self._clock()
        if now - self._last.get(kind, -_KIND_SECONDS) < _KIND_SECONDS:
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return
        self._last[kind] = now
        what = what[:_WHAT_LENGTH]
        if num_before := self._held_back.pop(kind, 0):
            what += f" (and {num_before:,} more of this kind since the last alert)"
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="alerts", daemon=True)
            self._thread.start()
        self._queue.put(Alert(kind, self._run, chunk, step, what))

    def close(self) -> None:
        """Wait a moment for what is under way, never longer than one delivery may take."""
        self._drain()
        self._senders.clear()

    def let_go(self, name: str) -> None:
        """Deliver what is under way, and tell this one no more: it ends."""
        if name in self._senders:
            self._drain()
            del self._senders[name]

    def _drain(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_LAST_WAIT_SECONDS)
            self._thread = None

    def _send_all(self) -> None:
        while (alert := self._queue.get()) is not None:
            for name, send in list(self._senders.items()):
                try:
                    send(alert)
                except Exception as error:  # whatever it is, training goes on
                    if name not in self._failing:
                        self._failing.add(name)
                        # Other errors may quote the address, which may hold a secret.
                        why = _named(error) if isinstance(error, OSError) else type(error).__name__
                        logger.warning("alerts do not reach the %s: %s; training goes on", name, why)

    # --- what is told ---

    def step_done(self, report: StepReport, spike: Spike | None) -> None:
        """Judge a finished step: numbers that are not finite, a spike, waiting for data."""
        if not self._senders:
            return
        chunk, step = report.after.chunk, report.after.global_step
        if report.problem == "not_finite":
            keys = f" ({', '.join(report.not_finite_keys[:3])})" if report.not_finite_keys else ""
            what = f"a loss or gradient is not finite{keys}; the step is passed over"
            self.tell("not_finite", what, chunk=chunk, step=step, cause=str(step))
        if spike is not None and spike.is_first:
            self.tell("spike", str(spike), chunk=chunk, step=step, cause=str(step))
        self._watch_waiting(report)

    def _watch_waiting(self, report: StepReport) -> None:
        limit, num_steps = self._settings.alert_wait_fraction, self._settings.alert_wait_steps
        share = report.waited_seconds / max(report.seconds, 1e-9)
        self._num_stalled = self._num_stalled + 1 if limit and share > limit else 0
        if limit and self._num_stalled == num_steps:
            what = (
                f"training waits for data: more than {limit:.0%} of the time in {num_steps:,} steps in a row, "
                f"{share:.0%} in the last; look at the storage, and at data.workers"
            )
            after = report.after
            cause = str(after.global_step)
            self.tell("stalled_data", what, chunk=after.chunk, step=after.global_step, cause=cause)

    def state_saved(self, root: Path, position: Position, *, state_bytes: int) -> None:
        """Look whether as many more states fit as `alert_free_states` says; each time that it gets low is a cause."""
        if not self._senders or not self._settings.alert_free_states:
            return
        try:
            free, wanted = free_bytes(root), self._settings.alert_free_states * state_bytes
        except OSError:  # whoever writes there next says so
            return
        was_low, self._is_disk_low = self._is_disk_low, free < wanted
        if self._is_disk_low and not was_low:
            what = (
                f"the disk gets full: {size_text(free)} are free in {root}, a state takes {size_text(state_bytes)}; "
                "make room, or lower save.keep_states, keep_chunks or keep_exports"
            )
            step = position.global_step
            self.tell("low_disk", what, chunk=position.chunk, step=step, cause=str(step))

    def campaign_done(self, position: Position, *, num_chunks: int) -> None:
        """Say that every chunk of the run is trained."""
        what = f"all {num_chunks:,} chunks are trained, {position.images_seen:,} images seen"
        self.tell("campaign_done", what, chunk=position.chunk, step=position.global_step, cause="")

    def failed(self, error: BaseException, *, chunk: str | None, position: Position | None = None) -> None:
        """Say why a launch ends; the first error is the one that is told."""
        if isinstance(error, Exception):
            step = position.global_step if position is not None else None
            chunk = position.chunk if position is not None else chunk
            self.tell("failed", f"the launch failed: {_named(error)}", chunk=chunk, step=step, cause="")

    @contextmanager
    def on_failure(self, position: Callable[[], Position | None]) -> Iterator[None]:
        """Tell what is raised inside, while trackers are still open."""
        try:
            yield
        except BaseException as error:
            self.failed(error, chunk=None, position=position())
            raise


def post(url: str, alert: Alert) -> None:
    """POST an alert as JSON; `text` and `content` are what chat programs show. Raises OSError, HTTPException."""
    body: dict[str, Any] = {
        "kind": alert.kind, "run": alert.run, "chunk": alert.chunk, "step": alert.step, "what": alert.what,
        "text": alert.text, "content": alert.text, "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    data = json.dumps(body, ensure_ascii=False).encode()
    request = Request(url, data, {"Content-Type": "application/json", "User-Agent": "chunkline"}, method="POST")
    with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        answer.read(1)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
