"""One launch at a time writes to a run: a lock that survives kill -9, reboots and requeues.

Files and numbers are in `lock_claims`, what tells launches apart in `launch_identity`. A process that was fenced off
between a `check` and its write can still finish that one write.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.launch_identity import Launch, numbers_mean_the_same, this_launch, why_dead
from training.lock_claims import Claims, Holder

logger = logging.getLogger(__name__)

_BEATS_PER_HEARTBEAT = 3


class LockHeldError(ValueError):
    """Another launch is using the run."""


class LockLostError(RuntimeError):
    """Another launch took the run over; this one must not write any more."""


@dataclass(frozen=True)
class HolderState:
    """Who holds a lock, and whether it still can. For `status`."""

    holder: Holder
    beat_age_seconds: float
    is_live: bool
    """False: the next launch takes the lock over at once."""
    reason: str
    """Why it is not live; "" when it is."""

    def __str__(self) -> str:
        beat = f"last heartbeat {self.beat_age_seconds:.0f} s ago"
        return f"{self.holder}, {beat}" if self.is_live else f"none is running; {self.holder} was killed: {self.reason}"


def holder_state(path: Path, *, now: float | None = None) -> HolderState | None:
    """Return who holds the lock at `path` and whether it lives; None when nobody does. Writes nothing.

    now: seconds on the clock of the file system; this machine's when None.
    """
    claims = Claims(path)
    number, _ = claims.highest()
    holder, beat = read_holder(path), claims.beat_time(number)
    if holder is None or beat is None:
        return None
    age_seconds, me = max((time.time() if now is None else now) - beat, 0.0), this_launch()
    reason = why_dead(holder.launch, me, beat) or ""
    limit_seconds = 2 * holder.heartbeat_seconds
    if not reason and not numbers_mean_the_same(holder.launch, me) and age_seconds > limit_seconds:
        reason = _silence(age_seconds, limit_seconds)
    return HolderState(holder, age_seconds, not reason, reason)


def read_holder(path: Path) -> Holder | None:
    """Return who holds the lock at `path`, dead or alive; None when nobody does. For `status`."""
    claims = Claims(path)
    number, is_released = claims.highest()
    return None if is_released or number == 0 else claims.read(number)


class RunLock:
    """A held lock. Make one with `RunLock.acquire`; leave it with `release` or as a context manager."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path = path
        self.holder = holder
        self._claims = Claims(path)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        path: Path,
        *,
        heartbeat_seconds: float = 30.0,
        now: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> "RunLock":
        """Take the lock at `path`, or raise LockHeldError saying who has it.

        Taken over at once: a dead process of this host, one from before a reboot, the same Slurm job before a restart.
        Another host's: when it gave no heartbeat for twice its stated `heartbeat_seconds`; waits for that if need be
        and gives up at the first beat. A living process of this host keeps it, however late its heartbeat.
        now: seconds on the clock of the file system that holds `path`, which is asked when None.
        """
        claims, me = Claims(path), this_launch()
        claims.folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = _wait_until_free(claims, me, heartbeat_seconds, now=now or claims.clock, sleep=sleep)
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            mine = Holder(number=number + 1, launch=me, since=since, heartbeat_seconds=heartbeat_seconds)
            if claims.claim(mine):
                try:
                    claims.show(mine.number)
                except FileNotFoundError:  # slept so long that it was taken over and cleared away
                    continue
                claims.remove_below(mine.number)
                return cls(path, mine)

    @property
    def number(self) -> int:
        """The fencing number; each acquisition's is higher than all before."""
        return self.holder.number

    def check(self) -> None:
        """Raise LockLostError unless this lock is still the newest claim. Call before every write."""
        try:
            number, is_released = self._claims.highest()
        except FileNotFoundError:
            number, is_released = 0, False
        if number == self.number and not is_released:
            return
        newer = self._claims.read(number) if number > self.number else None
        raise LockLostError(
            f"{self.path}: fencing number is {number}, ours is {self.number}: the run was taken over"
            f"{f' by {newer}' if newer else ''}; this launch stops writing"
        )

    def release(self) -> None:
        """Give the lock back. Does nothing when it was lost, released before, or in a forked child."""
        if os.getpid() != self.holder.launch.pid or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        try:
            self.check()
        except LockLostError as error:
            logger.warning("not released: %s", error)
            return
        self._claims.release(self.number)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(self.holder.heartbeat_seconds / _BEATS_PER_HEARTBEAT):
            try:
                self.check()
                self._claims.beat(self.number)
            except (FileNotFoundError, LockLostError) as error:
                logger.error("%s: heartbeat ends, the run was taken over (%s)", self.path, error)
                return
            except OSError as error:
                logger.warning("%s: heartbeat failed: %s", self.path, error)


def _wait_until_free(
    claims: Claims,
    me: Launch,
    heartbeat_seconds: float,
    *,
    now: Callable[[], float],
    sleep: Callable[[float], None],
) -> int:
    """Return the highest claim's number (0: none) once it is released or its holder is dead; see `RunLock.acquire`.

    heartbeat_seconds: ours, for a claim that cannot be read.
    """
    watched: tuple[int, float] | None = None
    while True:
        number, is_released = claims.highest()
        if number == 0 or is_released:
            return number
        holder, beat = claims.read(number), claims.beat_time(number)
        if beat is None:  # a newer claim was made and this one removed
            continue
        reason = why_dead(holder.launch, me, beat) if holder is not None else None
        age_seconds = now() - beat
        limit_seconds = 2 * (holder.heartbeat_seconds if holder is not None else heartbeat_seconds)
        is_near = holder is not None and numbers_mean_the_same(holder.launch, me)
        if reason is None and (is_near or watched not in (None, (number, beat))):
            raise LockHeldError(
                f"{claims.lock_path.parent}: in use by {holder}, last heartbeat {age_seconds:.0f} s ago; wait for it, "
                f"or ask it to stop with `touch {claims.lock_path.with_name('stop')}`"
            )
        if reason is not None or age_seconds > limit_seconds:
            why = reason or _silence(age_seconds, limit_seconds)
            logger.warning("%s: taking over from %s: %s", claims.lock_path, holder or f"claim {number}", why)
            return number
        if watched is None:
            logger.warning(
                "%s: held by %s; waiting up to %.0f s for a heartbeat", claims.lock_path, holder, limit_seconds
            )
        watched = (number, beat)
        sleep(min(1.0, limit_seconds / 10))


def _silence(age_seconds: float, limit_seconds: float) -> str:
    return f"no heartbeat for {age_seconds:.0f} s (limit {limit_seconds:.0f} s)"
