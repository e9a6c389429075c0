"""Ask Slurm: run one of its commands, and find in the queue what belongs to a workspace or a run.

Jobs are known by their name, which ends in a digest of the folder's path: `scan-4.0f3a9c21` is stage and number of
parts of a workspace, `newest/0005.7bd0c113` a chunk of a run. What is submitted is decided elsewhere (`submit_build`,
`submit_chunks`).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.status_queue import folder_digest

ROOT = Path(__file__).resolve().parents[1]


class SlurmError(RuntimeError):
    """sbatch or squeue is missing or has refused; the message holds what it said."""


@dataclass(frozen=True)
class Queued:
    """What the queue holds of one stage. tasks: numbers of its array's tasks; empty when it is no array."""

    job_ids: tuple[str, ...]
    tasks: Mapping[int, str]
    """Task number → id such as 12_3."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue, or a task of an array."""

    name: str
    """Without the digest."""
    job_id: str
    task: int | None
    state: str
    """Slurm's word for it, in lower case: pending, running, completing …; a pending one that is held is `held`."""

    @property
    def id(self) -> str:
        """The id that names this one alone: 12, or 12_3."""
        return self.job_id if self.task is None else f"{self.job_id}_{self.task}"


def jobs_of(folder: Path) -> list[QueuedJob]:
    """Return the jobs of a workspace or run that the queue holds, whoever submitted them, in the order of their ids.

    Raises SlurmError when squeue fails.
    """
    jobs = []
    for line in run_slurm(["squeue", "--noheader", "--array", "--format=%F|%K|%T|%r|%j"]).splitlines():
        job_id, task, state, reason, full_name = (word.strip() for word in line.split("|", 4))
        name, _, digest = full_name.rpartition(".")
        if digest == folder_digest(folder):
            is_held = state == "PENDING" and "held" in reason.lower()  # JobHeldUser, "job requeued in held state" …
            number = int(task) if task.isdigit() else None
            jobs.append(QueuedJob(name, job_id, number, "held" if is_held else state.lower()))
    return sorted(jobs, key=lambda job: (int(job.job_id), job.task or 0))


def job_name(workspace: Path, stage: str, num_parts: int) -> str:
    """Return the name by which the queue knows a stage of a workspace: `scan-4.0f3a9c21`."""
    return f"{stage}-{num_parts}.{folder_digest(workspace)}"


def read_queue(workspace: Path, num_parts: int) -> dict[str, Queued]:
    """Return what the queue holds of this workspace, by stage, whoever submitted it.

    Raises ValueError when arrays of another number of parts are there, SlurmError when squeue fails.
    """
    found: dict[str, tuple[list[str], dict[int, str]]] = {}
    for job in jobs_of(workspace):
        if not (match := re.fullmatch(r"([a-z]+)-(\d+)", job.name)):
            continue
        stage, parts = match[1], int(match[2])
        if parts != num_parts:
            raise ValueError(
                f"job {job.job_id} ({stage}) of this workspace is in the queue with --num-parts {parts}, not "
                f"{num_parts}; use --num-parts {parts}, or `scancel {job.job_id}` first"
            )
        job_ids, tasks = found.setdefault(stage, ([], {}))
        if job.job_id not in job_ids:
            job_ids.append(job.job_id)
        if job.task is not None:
            tasks[job.task] = job.id
    return {stage: Queued(tuple(job_ids), tasks) for stage, (job_ids, tasks) in found.items()}


def run_slurm(command: Sequence[str]) -> str:
    """Run a Slurm command from the checkout's root, in the environment of this Python; return what it printed."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]}: not found; run this on a login node of a Slurm cluster, or build on this machine with "
            "`python -m scripts.build_chunks`"
        )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    done = subprocess.run(list(command), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SlurmError(f"`{shlex.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
