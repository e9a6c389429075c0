"""The last command of slurm/train_chunk.sbatch: end the job with the launch's code, and requeue or hold it first.

    python -m scripts.end_chunk_job RUN_DIR [--signalled]

    code in last_exit.json            what becomes of the job
    0   done                          ends; the job that waits for it (afterok) starts
    75  stopped by a signal           requeued: the same job goes on later, those that wait keep waiting
    75  stopped by a person's file    held: `scontrol release JOB` goes on
    3   bad data                      held: mend it, then `scontrol release JOB`
    none, and the lock is still held  killed: requeued; the third time in a row that nothing was saved, it fails
    1, 2, or anything else            fails; Slurm cancels those that wait, and what is left of an array is held

Reads files and calls scontrol; it trains nothing and submits nothing.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.slurm_queue import SlurmError, run_slurm
from training.exit_codes import BAD_DATA, DONE, FAILED, STOPPED
from training.ledger import LedgerError, Line
from training.lock import read_holder
from training.run_dir import RunDir
from training.stop import STOP_FILE

_MAX_TRIES = 3
REQUEUE, HOLD, NOTHING = "requeue", "requeuehold", ""


@dataclass(frozen=True)
class Ending:
    """What becomes of a job. action: an scontrol command, or ""; code: what the job ends with."""

    action: str
    code: int
    sentence: str


def ending_of(code: int | None, *, is_signalled: bool, by_file: bool, was_killed: bool, tries: int) -> Ending:
    """Return what becomes of a job.

    code: what the launch wrote, None when nothing. is_signalled: the job's shell was, and then wrote the stop file
    itself. by_file: the launch was stopped by that file. was_killed: it still holds the run's lock. tries: launches in
    a row, with this one, after which no new state was there.
    """
    if code == DONE:
        return Ending(NOTHING, DONE, "done")
    if code == STOPPED and by_file and not is_signalled:
        return Ending(HOLD, STOPPED, "stopped as asked, state saved; held")
    if code == STOPPED:
        return Ending(REQUEUE, STOPPED, "stopped by a signal, state saved; requeued, goes on from there")
    if code == BAD_DATA:
        return Ending(HOLD, BAD_DATA, "bad data, see the error above; held: mend it first")
    if code is None and is_signalled:
        return Ending(REQUEUE, STOPPED, "signalled before training could say anything; requeued")
    if code is None and was_killed and tries < _MAX_TRIES:
        return Ending(REQUEUE, FAILED, "killed; requeued, goes on from the newest state")
    if code is None and was_killed:
        return Ending(NOTHING, FAILED, f"killed {tries} times in a row before a state was saved; not tried again")
    if code is None:
        return Ending(NOTHING, FAILED, "training ended without a word in last_exit.json, see the error above")
    return Ending(NOTHING, code, f"failed with code {code}, see the error above")


def launches_without_a_state(lines: Sequence[Line]) -> int:
    """Return how many launches at the end of the ledger saved nothing."""
    tries = 0
    for line in reversed(lines):
        if line.event in ("state_saved", "chunk_done"):
            break
        tries += line.event == "started"
    return tries


def end(root: Path, environment: Mapping[str, str], *, is_signalled: bool) -> Ending:
    """Find out how the launch in this job ended, and requeue or hold the job. Raises SlurmError, OSError."""
    run_dir, job = RunDir(root), _job_id(environment)
    holder = read_holder(run_dir.lock_path)
    was_killed = holder is not None and (holder.launch.slurm_job_id, holder.launch.slurm_restart_count) == (
        environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT") or 0),
    )  # fmt: skip
    try:
        lines = run_dir.read_ledger()
    except LedgerError:
        lines = []  # the launch has said so, and ended with 3
    tries, by_file = launches_without_a_state(lines), _was_stopped_by_file(lines)
    ending = ending_of(
        run_dir.own_exit_code(), is_signalled=is_signalled, by_file=by_file, was_killed=was_killed, tries=tries
    )
    if ending.action and not _is_running(job):  # a job that is cancelled would come back
        return Ending(NOTHING, ending.code, f"{ending.sentence.partition(';')[0]}; the job is being ended by Slurm")
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        _hold_rest(array, ending)
    if ending.action:
        run_slurm(["scontrol", ending.action, job])
    release = f"; `scontrol release {array or job}` goes on" if ending.action == HOLD else ""
    return Ending(ending.action, ending.code, ending.sentence + release)


def _was_stopped_by_file(lines: Sequence[Line]) -> bool:
    return bool(lines) and lines[-1].event == "stopped" and lines[-1].fields["reason"] == STOP_FILE


def _job_id(environment: Mapping[str, str]) -> str:
    """Return the name of this job for scontrol; one of an array's tasks must not be confused with the whole array."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def _is_running(job: str) -> bool:
    return run_slurm(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip() == "RUNNING"


def _hold_rest(array: str, ending: Ending) -> None:
    """Hold the waiting tasks of an array when this one was held or has failed: they would train the same chunk."""
    if ending.action == REQUEUE or ending.code == DONE:
        return
    waiting = run_slurm(["squeue", "--noheader", "--array", f"--jobs={array}", "--states=PENDING", "--format=%i"])
    for task in waiting.split():
        run_slurm(["scontrol", "hold", task])


def main(argv: list[str] | None = None) -> int:
    """End the job; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.end_chunk_job", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--signalled", action="store_true", help="Slurm has signalled the job's shell")
    options = parser.parse_args(argv)
    if "SLURM_JOB_ID" not in os.environ:
        parser.error("this is the last command of slurm/train_chunk.sbatch; there is no Slurm job here")
    try:
        ending = end(options.run_dir, os.environ, is_signalled=options.signalled)
    except (SlurmError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return RunDir(options.run_dir).last_exit_code() or FAILED
    print(f"job {_job_id(os.environ)}: {ending.sentence}", flush=True)
    return ending.code


if __name__ == "__main__":
    sys.exit(main())
