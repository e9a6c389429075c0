"""The jobs of a run in Slurm's queue, where there is one: their names end in a digest of the run's folder."""

import hashlib
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_KEPT_SECONDS = 30.0
_TIMEOUT_SECONDS = 10.0
_NOT_SET_UP = "Could not establish a configuration source"
"""What squeue says where Slurm is installed but no part of a cluster."""


@dataclass(frozen=True)
class Job:
    """One line of squeue. state: RUNNING, PENDING …; reason: the nodes it runs on, or why it waits, in brackets."""

    job_id: str
    name: str
    state: str
    elapsed: str
    reason: str


@dataclass(frozen=True)
class Queue:
    """problem: why the queue could not be asked; "" when it could."""

    jobs: Sequence[Job] = ()
    problem: str = ""

    def text(self) -> str:
        """Return it in a line: `31_0 train RUNNING 1:02 n1; 32 train PENDING 0:00 (Dependency)`; "no jobs"."""
        if self.problem:
            return self.problem
        shown = [f"{job.job_id} {job.name} {job.state} {job.elapsed} {job.reason}".strip() for job in self.jobs[:5]]
        more = [f"{len(self.jobs) - 5:,} more"] if len(self.jobs) > 5 else []
        return "; ".join([*shown, *more]) or "no jobs of this run"


class QueueReader:
    """Asks at most every half a minute: a controller serves many users."""

    def __init__(self, root: Path) -> None:
        self._digest = folder_digest(root)
        self._known: tuple[float, Queue | None] | None = None
        self._lock = threading.Lock()

    def read(self, *, wait: bool = True) -> Queue | None:
        """Return the run's jobs; None where there is no Slurm.

        wait: for the answer; else return the last one, None before the first, and ask meanwhile.
        """
        if shutil.which("squeue") is None:
            return None
        if wait:
            self._refresh()
        elif not self._lock.locked() and self._is_old():
            threading.Thread(target=self._refresh, daemon=True, name="ask the queue").start()
        return self._known[1] if self._known is not None else None

    def _is_old(self) -> bool:
        return self._known is None or time.monotonic() - self._known[0] > _KEPT_SECONDS

    def _refresh(self) -> None:
        with self._lock:
            if self._is_old():
                queue = self._ask()
                self._known = time.monotonic(), queue

    def _ask(self) -> Queue | None:
        command = ["squeue", "--noheader", "--format=%i|%T|%M|%R|%j"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Queue(problem=f"squeue does not answer ({error})")
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"squeue ended with {done.returncode}"]
            return None if _NOT_SET_UP in done.stderr else Queue(problem=f"not known: {said[-1]}")
        jobs = []
        for line in done.stdout.splitlines():
            job_id, state, elapsed, reason, name = (word.strip() for word in line.split("|", 4))
            shown, _, digest = name.rpartition(".")
            if digest == self._digest:
                jobs.append(Job(job_id, shown, state, elapsed, reason))
        return Queue(jobs)


def folder_digest(folder: Path) -> str:
    """Return what the names of a run's, or a workspace's, jobs end in: of its folder's path."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
