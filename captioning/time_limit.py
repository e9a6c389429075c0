"""Stop a computation that does not end, such as a regular expression that tries every way to match.

Works in the main thread, where Python's `re` looks for signals as it goes; elsewhere and on Windows nothing is stopped.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class TookTooLongError(Exception):
    """A call did not come back in time."""


def limited(call: Callable[[], T], *, seconds: float) -> T:
    """Return what the call returns. Raises TookTooLongError after `seconds` of clock time."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return call()

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLongError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
