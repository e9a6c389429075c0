"""What becomes of a job when its launch has ended, by exit code, signal, lock and ledger."""

from dataclasses import asdict

import pytest

from scripts import end_chunk_job
from scripts.end_chunk_job import HOLD, NOTHING, REQUEUE, Ending, ending_of, launches_without_a_state
from training.ledger import Line
from training.lock import RunLock
from training.run_dir import RunDir

QUIET = {"is_signalled": False, "by_file": False, "was_killed": False, "tries": 1}


@pytest.mark.parametrize(
    ("code", "facts", "action", "ends_with"),
    [
        (0, {}, NOTHING, 0),
        (0, {"is_signalled": True}, NOTHING, 0),
        (75, {}, REQUEUE, 75),
        (75, {"by_file": True, "is_signalled": True}, REQUEUE, 75),
        (75, {"by_file": True}, HOLD, 75),
        (3, {"is_signalled": True}, HOLD, 3),
        (1, {}, NOTHING, 1),
        (2, {}, NOTHING, 2),
        (None, {"is_signalled": True}, REQUEUE, 75),
        (None, {"was_killed": True}, REQUEUE, 1),
        (None, {"was_killed": True, "tries": 3}, NOTHING, 1),
        (None, {}, NOTHING, 1),
    ],
)
def test_what_becomes_of_a_job_follows_from_how_its_launch_ended(code, facts, action, ends_with):
    ending = ending_of(code, **{**QUIET, **facts})

    assert (ending.action, ending.code) == (action, ends_with)


def line(event: str) -> Line:
    return Line(number=0, time="", event=event, fields={}, previous="", hash="")


def test_only_launches_after_the_newest_state_count_as_tries():
    events = ["started", "started", "state_saved", "started", "failed", "started"]

    assert launches_without_a_state([line(event) for event in events]) == 2
    assert launches_without_a_state([line("started"), line("chunk_done")]) == 0
    assert launches_without_a_state([]) == 0


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job 7, running; returns what is asked of Slurm."""
    asked: list[str] = []

    def answer(command):
        asked.append(" ".join(command[:3]) if command[0] == "scontrol" else command[0])
        return "7_4\n7_5\n" if "--states=PENDING" in command else "RUNNING\n"

    monkeypatch.setattr(end_chunk_job, "run_slurm", answer)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return asked


def test_a_launch_that_was_killed_still_holds_the_lock_and_its_job_is_requeued(slurm, tmp_path):
    with RunLock.acquire(tmp_path / "lock"):
        ending = end_chunk_job.end(tmp_path, {"SLURM_JOB_ID": "7"}, is_signalled=False)

    assert ending.action == REQUEUE
    assert slurm[-1] == "scontrol requeue 7"


def test_a_launch_that_never_came_to_the_lock_is_not_tried_again(slurm, tmp_path, capsys):
    assert end_chunk_job.main([str(tmp_path)]) == 1

    assert slurm == []
    assert "job 7: training ended without a word" in capsys.readouterr().out


def test_a_lock_held_by_another_job_is_no_sign_that_this_launch_was_killed(slurm, tmp_path, monkeypatch):
    with RunLock.acquire(tmp_path / "lock"):
        ending = end_chunk_job.end(tmp_path, {"SLURM_JOB_ID": "8"}, is_signalled=False)

    assert asdict(ending)["action"] == NOTHING
    assert slurm == []


def test_a_task_of_an_array_is_named_alone_and_the_rest_is_held_with_it(slurm, tmp_path):
    RunDir(tmp_path).write_last_exit(3)
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}

    ending = end_chunk_job.end(tmp_path, task, is_signalled=False)

    assert slurm == ["squeue", "squeue", "scontrol hold 7_4", "scontrol hold 7_5", "scontrol requeuehold 7_3"]
    assert ending.sentence.endswith("`scontrol release 7` goes on")


def test_a_job_that_is_being_cancelled_does_not_come_back(slurm, tmp_path, monkeypatch):
    RunDir(tmp_path).write_last_exit(75)
    monkeypatch.setattr(end_chunk_job, "run_slurm", lambda command: "COMPLETING\n")

    ending = end_chunk_job.end(tmp_path, {"SLURM_JOB_ID": "7"}, is_signalled=False)

    assert ending == Ending(NOTHING, 75, "stopped by a signal, state saved; the job is being ended by Slurm")


def test_outside_a_job_it_says_what_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    with pytest.raises(SystemExit, match="2"):
        end_chunk_job.main([str(tmp_path)])

    assert "last command of slurm/train_chunk.sbatch" in capsys.readouterr().err
