"""One launch at a time writes to a run: a lock that survives kill -9, reboots and requeues.

    lock            who holds it, as JSON; there exactly while it is held
    fence/000017    the claim: `lock` is a second name of the highest one. Its mtime is the heartbeat
    fence/000017.released

The holder is whoever made the claim with the highest number. A claim is made with link(), which fails if the name
exists, so of two processes that want number 18 one gets it; that holds on local disks, NFS and Lustre alike, and needs
no lock daemon. (Where there are no hard links: exclusive creation.) A claim is never changed, and the highest never
deleted, so numbers only grow. `check` lists the folder, which NFS answers freshly, unlike a look-up by name.
A process that was fenced off between a `check` and its write can still finish that one write.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sharding.files import fsync_folder

logger = logging.getLogger(__name__)

_RELEASED = ".released"
_BEATS_PER_HEARTBEAT = 3


class LockHeldError(ValueError):
    """Another launch is using the run."""


class LockLostError(RuntimeError):
    """Another launch took the run over; this one must not write any more."""


@dataclass(frozen=True)
class Launch:
    """What tells one launch's process from all others. None: unknown on this system, or not under Slurm."""

    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    process_start: str | None
    slurm_job_id: str | None
    slurm_restart_count: int


@dataclass(frozen=True)
class Holder:
    """The contents of `lock`."""

    number: int
    launch: Launch
    since: str
    """UTC."""
    heartbeat_seconds: float

    def __str__(self) -> str:
        launch = self.launch
        job = f", Slurm job {launch.slurm_job_id} restart {launch.slurm_restart_count}" if launch.slurm_job_id else ""
        return f"process {launch.pid} on {launch.host}{job}, since {self.since}"


def this_launch() -> Launch:
    """Describe this process."""
    return Launch(
        host=socket.gethostname(),
        boot_id=_read_text(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        slurm_job_id=os.environ.get("SLURM_JOB_ID") or None,
        slurm_restart_count=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def process_start(pid: int) -> str | None:
    """Return when a process started, in a form only good for comparing; None when it is dead (or a zombie).

    From /proc where there is one (clock ticks since boot), else from `ps` (a date).
    """
    if Path("/proc/self/stat").exists():
        stat = _read_text(Path(f"/proc/{pid}/stat"))
        if stat is None:
            return None
        after_name = stat[stat.rindex(")") + 2 :].split()  # the name may hold spaces and brackets
        return None if after_name[0] in "ZX" else after_name[19]
    if os.name == "nt":  # no cheap way; `_numbers_mean_the_same` leaves it to the heartbeat
        return None
    result = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


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
    number, is_released = _highest(_fence(path))
    holder = read_holder(path)
    beat = _mtime(_fence(path) / _name(number))
    if is_released or holder is None or beat is None:
        return None
    age_seconds, me = max((time.time() if now is None else now) - beat, 0.0), this_launch()
    reason = _why_dead(holder, me, beat) or ""
    limit_seconds = 2 * holder.heartbeat_seconds
    if not reason and not _numbers_mean_the_same(holder.launch, me) and age_seconds > limit_seconds:
        reason = f"no heartbeat for {age_seconds:.0f} s (limit {limit_seconds:.0f} s)"
    return HolderState(holder, age_seconds, not reason, reason)


def read_holder(path: Path) -> Holder | None:
    """Return who holds the lock at `path`, dead or alive; None when nobody does. For `status`."""
    number, is_released = _highest(_fence(path))
    return None if is_released or number == 0 else _read_claim(_fence(path), number)


class RunLock:
    """A held lock. Make one with `RunLock.acquire`; leave it with `release` or as a context manager."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path = path
        self.holder = holder
        self._claim = _fence(path) / _name(holder.number)
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
        fence = _fence(path)
        fence.mkdir(parents=True, exist_ok=True)
        me = this_launch()
        watched: tuple[int, float] | None = None
        while True:
            number, is_released = _highest(fence)
            if number and not is_released:
                holder = _read_claim(fence, number)
                beat = _mtime(fence / _name(number))
                if beat is None:  # a newer claim was made and this one removed
                    continue
                reason = _why_dead(holder, me, beat)
                if reason is None:
                    age_seconds = (now() if now else _file_system_now(fence)) - beat
                    limit_seconds = 2 * holder.heartbeat_seconds if holder else 2 * heartbeat_seconds
                    is_near = holder is not None and _numbers_mean_the_same(holder.launch, me)
                    if is_near or (watched is not None and watched != (number, beat)):
                        raise LockHeldError(
                            f"{path.parent}: in use by {holder}, last heartbeat {age_seconds:.0f} s ago; wait for it, "
                            f"or ask it to stop with `touch {path.with_name('stop')}`"
                        )
                    if age_seconds <= limit_seconds:
                        if watched is None:
                            logger.warning(
                                "%s: held by %s; waiting up to %.0f s for a heartbeat", path, holder, limit_seconds
                            )
                        watched = (number, beat)
                        sleep(min(1.0, limit_seconds / 10))
                        continue
                    reason = f"no heartbeat for {age_seconds:.0f} s (limit {limit_seconds:.0f} s)"
                logger.warning("%s: taking over from %s: %s", path, holder or f"claim {number}", reason)
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            mine = Holder(number=number + 1, launch=me, since=since, heartbeat_seconds=heartbeat_seconds)
            watched = None
            if _claim(fence, mine):
                try:
                    _show(path, fence / _name(mine.number))
                except FileNotFoundError:  # slept so long that it was taken over and cleared away
                    continue
                _remove_claims_below(fence, mine.number)
                return cls(path, mine)

    @property
    def number(self) -> int:
        """The fencing number; each acquisition's is higher than all before."""
        return self.holder.number

    def check(self) -> None:
        """Raise LockLostError unless this lock is still the newest claim. Call before every write."""
        try:
            number, is_released = _highest(self._claim.parent)
        except FileNotFoundError:
            number, is_released = 0, False
        if number == self.number and not is_released:
            return
        newer = _read_claim(self._claim.parent, number) if number > self.number else None
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
        self._claim.with_name(self._claim.name + _RELEASED).touch()
        self.path.unlink(missing_ok=True)
        fsync_folder(self._claim.parent)
        fsync_folder(self.path.parent)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(self.holder.heartbeat_seconds / _BEATS_PER_HEARTBEAT):
            try:
                os.utime(self._claim)  # without times: the file server's clock, the same for all hosts
                if not self.path.exists() or not self.path.samefile(self._claim):
                    self.check()
                    _show(self.path, self._claim)
            except (FileNotFoundError, LockLostError) as error:
                logger.error("%s: heartbeat ends, the run was taken over (%s)", self.path, error)
                return
            except OSError as error:
                logger.warning("%s: heartbeat failed: %s", self.path, error)


# --- judging a holder ---


def _why_dead(holder: Holder | None, me: Launch, beat: float) -> str | None:
    """Say why the holder cannot be alive; None when only its heartbeat can tell, or when it lives."""
    if holder is None:
        return None
    launch = holder.launch
    is_same_job = launch.slurm_job_id is not None and launch.slurm_job_id == me.slurm_job_id
    if is_same_job and me.slurm_restart_count > launch.slurm_restart_count:
        return f"Slurm job {me.slurm_job_id} was restarted (restart {me.slurm_restart_count})"
    if launch.host == me.host and launch.boot_id != me.boot_id:
        # Two machines may carry one name: a beat since our boot cannot be from before it.
        boot_time = _boot_time()
        return "the machine was restarted" if boot_time is not None and beat < boot_time else None
    if not _numbers_mean_the_same(launch, me):
        return None
    start = process_start(launch.pid)
    if start is None:
        return f"process {launch.pid} is dead"
    return f"process number {launch.pid} is another process now" if start != launch.process_start else None


def _numbers_mean_the_same(launch: Launch, me: Launch) -> bool:
    """Tell whether process numbers mean the same to both, so that one can see whether the other lives."""
    places = [(one.host, one.boot_id, one.pid_namespace) for one in (launch, me)]
    return places[0] == places[1] and me.process_start is not None


# --- claims ---


def _fence(path: Path) -> Path:
    return path.with_name("fence")


def _name(number: int) -> str:
    return f"{number:06d}"


def _highest(fence: Path) -> tuple[int, bool]:
    """Return the highest claim's number (0: none) and whether it was released."""
    names = {path.name for path in fence.iterdir()} if fence.exists() else set()
    number = max((int(name) for name in names if name.isdecimal()), default=0)
    return number, _name(number) + _RELEASED in names


def _claim(fence: Path, holder: Holder) -> bool:
    """Make the claim; False when another process was faster."""
    target = fence / _name(holder.number)
    data = json.dumps(asdict(holder)).encode()
    draft = fence / f"draft-{holder.launch.host}-{os.getpid()}-{threading.get_ident()}"
    try:
        _write(draft, data, os.O_TRUNC)
        try:
            os.link(draft, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            try:
                _write(target, data, os.O_EXCL)
            except FileExistsError:
                return False
    finally:
        draft.unlink(missing_ok=True)
    fsync_folder(fence)
    # A process that slept since it looked may have remade a number that was used and removed meanwhile.
    if _highest(fence)[0] != holder.number:
        target.unlink(missing_ok=True)
        return False
    return True


def _write(path: Path, data: bytes, flag: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _show(path: Path, claim: Path) -> None:
    """Make `path` a second name of the claim, for people and for its mtime; a copy where there are no hard links."""
    draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        os.link(claim, draft)
    except FileNotFoundError:
        raise
    except OSError:
        draft.write_bytes(claim.read_bytes())
    os.replace(draft, path)
    draft.unlink(missing_ok=True)  # replacing a link by a link to the same file leaves both
    fsync_folder(path.parent)


def _remove_claims_below(fence: Path, number: int) -> None:
    for path in fence.iterdir():
        if path.stem.isdecimal() and int(path.stem) < number:
            path.unlink(missing_ok=True)


def _read_claim(fence: Path, number: int) -> Holder | None:
    """Return a claim's contents; None when it is gone or not yet whole (possible without hard links only)."""
    try:
        raw = json.loads((fence / _name(number)).read_text(encoding="utf-8"))
        return Holder(**{**raw, "launch": Launch(**raw["launch"])})
    except (FileNotFoundError, json.JSONDecodeError, TypeError, KeyError):
        return None


# --- the system ---


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _file_system_now(folder: Path) -> float:
    """Return the time on the clock that gives files in `folder` their mtime."""
    probe = folder / f"clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _boot_time() -> float | None:
    for line in (_read_text(Path("/proc/stat")) or "").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return None


def _pid_namespace() -> str | None:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
