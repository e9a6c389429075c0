"""submit_chunks without a Slurm: what is submitted, in which order, what is refused, what is printed."""

import json
from pathlib import Path

import pytest

from scripts import submit_chunks, tiny_run
from scripts.slurm_queue import QueuedJob, SlurmError
from scripts.submit_chunks import NEXT, ChunkJob, Submission, assign, submit, submit_chunk, table
from sharding.chunk import ChunkError
from training.campaign import Campaign
from training.status_queue import folder_digest

CHUNKS = ["a/0", "a/1", "a/2", "a/3"]
DEMO = str(tiny_run.DEMO.relative_to(tiny_run.ROOT))


@pytest.fixture(autouse=True)
def sent(monkeypatch):
    """Let sbatch give the ids 100, 101 …; return the commands it got. Nothing is in the queue."""
    commands: list[tuple[str, ...]] = []

    def answer(command):
        if command[0] == "squeue":
            return ""
        commands.append(tuple(command))
        return f"{99 + len(commands)};cluster\n"

    monkeypatch.setattr(submit_chunks, "run_slurm", answer)
    monkeypatch.setattr("scripts.slurm_queue.run_slurm", answer)
    monkeypatch.setattr("shutil.which", lambda name, **_: name)
    monkeypatch.chdir(tiny_run.ROOT)
    return commands


@pytest.fixture
def submission(tmp_path) -> Submission:
    return Submission(Path("run.toml"), tmp_path / "run", ("seed=2",), ("--time=1:00:00",))


def call(submission, assigned, wanted, *, as_array=False, dry_run=False) -> dict[str, ChunkJob]:
    jobs = submit(submission, CHUNKS, assigned=assigned, wanted=wanted, as_array=as_array, dry_run=dry_run)
    return {job.chunk: job for job in jobs}


def job(name: str, job_id: str, task: int | None = None, state: str = "pending") -> QueuedJob:
    return QueuedJob(name, job_id, task, state)


def test_each_job_waits_for_the_one_before_it(submission, sent):
    jobs = call(submission, {}, CHUNKS[:3])

    assert [(one.state, one.job_id, one.waits_for) for one in jobs.values()] == [
        ("submitted", "100", ""), ("submitted", "101", "100"), ("submitted", "102", "101"), ("not_submitted", "", ""),
    ]  # fmt: skip
    assert "--dependency=afterok:100" in sent[1]
    assert sent[1][-9:] == (
        f"--output={submission.run_dir}/logs/a-1-%j.log", "--time=1:00:00", "slurm/train_chunk.sbatch", "run.toml",
        str(submission.run_dir), "--chunk", "a/1", "--set", "seed=2",
    )  # fmt: skip
    assert f"--job-name=a/1.{folder_digest(submission.run_dir)}" in sent[1]
    assert (submission.run_dir / "logs").is_dir()


def test_what_is_queued_is_not_submitted_again_and_is_waited_for(submission, sent):
    jobs = call(submission, assign([job("a/0", "7", state="running"), job("a/1", "8")], CHUNKS), CHUNKS[:3])

    assert [(one.state, one.job_id) for one in jobs.values()][:3] == [
        ("running", "7"), ("pending", "8"), ("submitted", "100"),
    ]  # fmt: skip
    assert jobs["a/2"].waits_for == "8"
    assert len(sent) == 1


def test_tasks_of_an_array_stand_for_the_chunks_that_are_left(submission, sent):
    tasks = [job(NEXT, "7", task) for task in (1, 2)]

    assigned = assign([job("a/1", "5"), *tasks], CHUNKS)

    assert {chunk: one.id for chunk, one in assigned.items()} == {"a/0": "7_1", "a/1": "5", "a/2": "7_2"}


def test_an_array_is_one_job_of_which_one_task_runs_at_a_time(submission, sent):
    jobs = call(submission, assign([job("a/0", "7")], CHUNKS), CHUNKS, as_array=True)

    assert [one.job_id for one in jobs.values()] == ["7", "100_0", "100_1", "100_2"]
    assert {"--array=0-2%1", "--dependency=afterok:7"} < set(sent[0])
    assert "--chunk" not in sent[0]
    assert len(sent) == 1


def test_a_gap_in_the_chain_is_refused(submission, sent):
    with pytest.raises(ChunkError, match=r"chunk a/0: neither done nor in the queue, but a/1.*scancel 8"):
        call(submission, assign([job("a/1", "8")], CHUNKS), CHUNKS)
    with pytest.raises(ChunkError, match="chunk a/2: a/0 comes before it"):
        call(submission, {}, CHUNKS[2:])
    with pytest.raises(ChunkError, match="chunk a/2: a/1 comes before it"):
        call(submission, assign([job("a/0", "8")], CHUNKS), CHUNKS[2:])
    assert sent == []


def test_when_sbatch_refuses_it_is_said_what_was_submitted_before(submission, monkeypatch):
    def refuse(command):
        if "--chunk" in command and "a/2" in command:
            raise SlurmError("sbatch: QOSMaxSubmitJobPerUserLimit")
        return "5\n"

    monkeypatch.setattr(submit_chunks, "run_slurm", refuse)

    with pytest.raises(SlurmError, match=r"QOSMax.*\nsubmitted before: 2 jobs; the same command again"):
        call(submission, {}, CHUNKS)


def test_one_chunk_is_submitted_unless_the_run_has_jobs(tmp_path, sent, monkeypatch):
    first = submit_chunk(Path("run.toml"), tmp_path / "run", "a/0", sbatch_options=["--mem=1G"])
    monkeypatch.setattr(submit_chunks, "jobs_of", lambda _: [job(NEXT, "9", 2, "running")])
    second = submit_chunk(Path("run.toml"), tmp_path / "run", "a/0")

    assert (first.state, first.job_id) == ("submitted", "100")
    assert (second.state, second.job_id) == ("running", "9_2")
    assert len(sent) == 1


def test_the_table_of_a_long_campaign_is_short():
    jobs = [ChunkJob("x/0003", "running", "7")]
    jobs += [ChunkJob(f"x/{number:04d}", "submitted", str(number), str(number - 1)) for number in range(4, 700)]

    lines = table(jobs, 3).splitlines()

    assert [line.split()[:2] for line in lines] == [
        ["chunk", "state"], ["3", "chunks"], ["x/0003", "running"], ["x/0004", "submitted"], ["x/0005", "submitted"],
        ["…", "693"], ["x/0699", "submitted"],
    ]  # fmt: skip


# --- the command, on a workspace ---


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "NUM_SAMPLES", 2)
        tiny_run.make_workspace(root, num_chunks=4)
    return root


@pytest.fixture
def command(workspace, tmp_path, capsys):
    """Return a function that runs the command and returns its exit code, table or JSON, and errors."""

    def run(*options: str) -> tuple[int, str, str]:
        words = [DEMO, "--run-dir", str(tmp_path / "run"), "--set", f"data.workspace='{workspace}'"]
        code = submit_chunks.main([*words, "--set", "data.chunks=['real/*']", *options])
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_prints_and_writes_nothing(command, sent, tmp_path):
    code, out, _ = command("--dry-run", "--count", "2", "--", "--gpus-per-node=8")

    assert code == 0
    assert out.count("$ sbatch --parsable") == out.count("--gpus-per-node=8") == 2
    assert "nothing was submitted (--dry-run); 2 not submitted yet" in out
    assert sent == [] and not (tmp_path / "run").exists()


def test_no_more_jobs_than_allowed_are_in_the_queue(command, sent, monkeypatch):
    there = [job("real/0000", "7", state="running")]
    monkeypatch.setattr(submit_chunks, "jobs_of", lambda _: there)

    code, out, _ = command("--max-queued", "2", "--json")

    states = [one["state"] for one in json.loads(out)["jobs"]]
    assert (code, states) == (0, ["running", "submitted", "not_submitted", "not_submitted"])
    there.append(job("real/0001", "100"))
    _, out, _ = command("--max-queued", "2")
    assert "nothing to submit: the queue holds what is to do; 2 not submitted yet" in out
    assert len(sent) == 1


def test_a_job_that_has_trained_its_chunk_but_not_ended_is_waited_for(command, sent, monkeypatch):
    monkeypatch.setattr(Campaign, "is_done", lambda _, name: name == "real/0000")

    for state, waits in (("running", True), ("held", False)):
        monkeypatch.setattr(submit_chunks, "jobs_of", lambda _, state=state: [job("real/0000", "7", state=state)])
        code, _, _ = command("--count", "2")

        assert code == 0
        assert [("--dependency=afterok:7" in words) for words in sent[-2:]] == [waits, False]


def test_a_chunk_to_start_from_must_be_in_the_run_and_have_its_turn(command):
    code, _, error = command("--from", "real/0007")
    assert (code, "chunk real/0007: not in this run's data.chunks" in error) == (3, True)
    code, _, error = command("--from", "real/0002")
    assert code == 3
    assert "real/0000 comes before it and is neither done nor in the queue" in error


def test_it_has_to_be_run_in_the_checkout(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    code, _, error = command()

    assert code == 2
    assert "paths in configs start at the checkout" in error


@pytest.mark.parametrize("words", [["--count", "0"], ["--max-queued", "-1"], ["--chain", "--array"]])
def test_what_makes_no_sense_is_refused(command, words):
    with pytest.raises(SystemExit, match="2"):
        command(*words)
