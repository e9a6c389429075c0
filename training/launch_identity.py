"""What tells one launch's process from all others, and whether one that held a run's lock can still be alive."""

import contextlib
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path


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
    if os.name == "nt":  # no cheap way; `numbers_mean_the_same` leaves it to the heartbeat
        return None
    result = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def why_dead(launch: Launch, me: Launch, beat: float) -> str | None:
    """Say why a launch, last heard of at `beat` (seconds since 1970), cannot be alive.

    None when it lives, or when only its heartbeat can tell.
    """
    is_same_job = launch.slurm_job_id is not None and launch.slurm_job_id == me.slurm_job_id
    if is_same_job and me.slurm_restart_count > launch.slurm_restart_count:
        return f"Slurm job {me.slurm_job_id} was restarted (restart {me.slurm_restart_count})"
    if launch.host == me.host and launch.boot_id != me.boot_id:
        # Two machines may carry one name: a beat since our boot cannot be from before it.
        boot_time = _boot_time()
        return "the machine was restarted" if boot_time is not None and beat < boot_time else None
    if not numbers_mean_the_same(launch, me):
        return None
    start = process_start(launch.pid)
    if start is None:
        return f"process {launch.pid} is dead"
    return f"process number {launch.pid} is another process now" if start != launch.process_start else None


def numbers_mean_the_same(launch: Launch, me: Launch) -> bool:
    """Tell whether process numbers mean the same to both, so that one can see whether the other lives."""
    places = [(one.host, one.boot_id, one.pid_namespace) for one in (launch, me)]
    return places[0] == places[1] and me.process_start is not None


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
