"""Notice a request to stop: SIGTERM, SIGUSR1, Ctrl-C, or a `stop` file in the run folder.

Launchers trap signals and write the file; a bare `python -m training run` gets the signal itself. Polling is up to
the caller: every step, and inside previews and encodes.
"""

import signal
from collections.abc import Callable
from types import FrameType

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
STOP_FILE = "stop file"
"""The reason when a stop was asked for by the file."""


class StopRequest:
    """Remembers that someone asked to stop. Use as a context manager; the old handlers come back at the end."""

    def __init__(self, stop_file_exists: Callable[[], bool]) -> None:
        self._stop_file_exists = stop_file_exists
        self._reason = ""
        self._old_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def poll(self) -> str:
        """Return why to stop ("SIGTERM", "stop file"), or "" to go on."""
        if not self._reason and self._stop_file_exists():
            self._reason = STOP_FILE
        return self._reason

    def poll_signals(self) -> str:
        """The same without looking for the file, which one rank does for all."""
        return self._reason

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self._reason = signal.Signals(number).name
