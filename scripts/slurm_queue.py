"""Ask Slurm: run one of its commands, and find in the queue what belongs to a workspace.

Jobs of a workspace are known by their name, `scan-4.0f3a9c21`: stage, number of parts, digest of the workspace's path.
What is submitted is decided elsewhere (`submit_build`).
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class SlurmError(RuntimeError):
    """sbatch or squeue is missing or has refused; the message holds what it said."""


@dataclass(frozen=True)
class Queued:
    """What the queue holds of one stage. tasks: numbers of its array's tasks; empty when it is no array."""

    job_ids: tuple[str, ...]
    tasks: Mapping[int, str]
    """Task number → id such as 12_3."""


def job_name(workspace: Path, stage: str, num_parts: int) -> str:
    """Return the name by which the queue knows a stage of a workspace: `scan-4.0f3a9c21`."""
    digest = hashlib.sha256(str(workspace.resolve()).encode()).hexdigest()[:8]
    return f"{stage}-{num_parts}.{digest}"


def read_queue(workspace: Path, num_parts: int) -> dict[str, Queued]:
    """Return what the queue holds of this workspace, by stage, whoever submitted it.

    Raises ValueError when arrays of another number of parts are there, SlurmError when squeue fails.
    """
    name = re.compile(rf"([a-z]+)-(\d+)\.{job_name(workspace, '', 0).rpartition('.')[2]}")
    found: dict[str, tuple[list[str], dict[int, str]]] = {}
    for line in run_slurm(["squeue", "--noheader", "--array", "--format=%F|%K|%j"]).splitlines():
        job_id, task, shown = (word.strip() for word in line.split("|", 2))
        if not (match := name.fullmatch(shown)):
            continue
        stage, parts = match[1], int(match[2])
        if parts != num_parts:
            raise ValueError(
                f"job {job_id} ({shown}) of this workspace is in the queue with --num-parts {parts}, not {num_parts}; "
                f"use --num-parts {parts}, or `scancel {job_id}` first"
            )
        job_ids, tasks = found.setdefault(stage, ([], {}))
        if job_id not in job_ids:
            job_ids.append(job_id)
        if task.isdigit():
            tasks[int(task)] = f"{job_id}_{task}"
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
