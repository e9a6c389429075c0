"""A run as jobs of a real Slurm: preempted, killed, requeued, drained, on two nodes; it ends as if undisturbed."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import pytest

from scripts import submit_chunks, tiny_run
from scripts.commands import PYTHON
from scripts.tiny_run import TinyRun, make_workspace, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a dozen launches, each of which imports torch

CHUNKS = [f"real/{number:04d}" for number in range(6)]
SMALL = ("--cpus-per-task=1", "--mem=2G")


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Return a function that gives a fresh TinyRun of six chunks, 16 steps each, without previews."""
    from scripts.demo_models.stage_c import make_stage_c_models

    root = tmp_path_factory.mktemp("campaign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # or every job compiles diffusers anew
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes' names are made up
        patch.setattr(tiny_run, "NUM_SAMPLES", 8)
        make_workspace(root / "workspace", num_chunks=len(CHUNKS))
        make_stage_c_models(root / "models", seed=7)
        overrides = [*tiny_overrides(root / "workspace", root / "models"), "data.epochs=8", "preview.prompts=[]"]
        overrides.append(f"save.keep_chunks={len(CHUNKS)}")  # to compare the weights after each
        yield lambda name: TinyRun(root / name, overrides, config=tiny_run.DEMO.relative_to(tiny_run.ROOT))


@pytest.fixture(scope="module")
def undisturbed(make_run):
    """The run that all others must equal, in one process."""
    run = make_run("undisturbed")
    assert run.train("--chunks", ":") == 0, run.log.read_text()
    return run


@pytest.fixture
def submit(capsys) -> Callable[..., dict[str, dict]]:
    """Return a function that submits a run's chunks and returns what was said about each that is not done."""

    def call(run: TinyRun, *options: str, sbatch: tuple[str, ...] = ()) -> dict[str, dict]:
        code = submit_chunks.main([*run.arguments("")[1:], "--json", *options, "--", *SMALL, *sbatch])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return {job["chunk"]: job for job in json.loads(captured.out)["jobs"]}

    return call


def states(jobs: dict[str, dict]) -> list[str]:
    return [job["state"] for job in jobs.values()]


def logs_of(run: TinyRun) -> str:
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted((run.root / "logs").glob("*.log")))


def queue() -> list[list[str]]:
    """Jobs and array tasks with their state, reason and node."""
    listing = subprocess.check_output(["squeue", "--noheader", "--array", "--format=%i|%T|%r|%N"], text=True)
    return [line.split("|") for line in listing.splitlines()]


def wait_until(condition: Callable[[], bool], run: TinyRun, *, hurry: bool = True) -> None:
    """Wait. hurry: jobs that were requeued start after 3 seconds; Slurm waits for two minutes, so that nodes forget."""
    deadline = time.monotonic() + 240
    requeued: dict[str, float] = {}
    while not condition():
        assert time.monotonic() < deadline, f"{queue()}\n{logs_of(run)}"
        waiting = [job for job, state, reason, _ in queue() if (state, reason) == ("PENDING", "BeginTime")]
        requeued = {job: requeued.get(job, time.monotonic()) for job in waiting}
        for job, since in requeued.items():
            if hurry and time.monotonic() - since > 3:
                subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=False)
        time.sleep(0.1)


def trains(run: TinyRun, chunk: str) -> Callable[[], bool]:
    """Tell whether steps of a chunk were trained. The file's last line may be half written."""
    metrics = run.root / "metrics.jsonl"
    return lambda: metrics.exists() and f'"chunk": "{chunk}"' in metrics.read_text()


def is_queue_empty() -> bool:
    return not queue()


def node_of(job: str) -> str:
    return next(node for name, _, _, node in queue() if name == job)


def assert_trained_once_and_equal(run: TinyRun, undisturbed: TinyRun, chunks: list[str]) -> None:
    expected = [row for row in undisturbed.rows("trace.jsonl") if row["chunk"] in chunks]
    assert run.rows("trace.jsonl") == expected
    for chunk in chunks:
        assert undisturbed.final_files(chunk)
        assert run.final_files(chunk) == undisturbed.final_files(chunk), f"weights of {chunk} differ"
    assert [fields["chunk"] for fields in run.events("chunk_done")] == chunks


def test_six_chunks_are_trained_once_and_in_order_whatever_happens_to_their_jobs(make_run, undisturbed, submit):
    run = make_run("chain")
    jobs = submit(run)
    again = submit(run)
    ids = [job["job_id"] for job in jobs.values()]
    assert states(jobs) == ["submitted"] * 6
    assert [job["waits_for"] for job in jobs.values()] == ["", *ids[:-1]]
    assert [job["job_id"] for job in again.values()] == ids
    assert "submitted" not in states(again)

    # --- preempted: Slurm ends the job for one of higher priority ---
    wait_until(trains(run, CHUNKS[0]), run)
    more_important = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(more_important, check=True)
    # --- killed: as by the kernel when memory is full ---
    wait_until(trains(run, CHUNKS[1]), run)
    os.kill(json.loads((run.root / "lock").read_text())["launch"]["pid"], signal.SIGKILL)
    # --- the time limit comes near ---
    wait_until(trains(run, CHUNKS[2]), run)
    subprocess.run(["scancel", "--signal=USR1", "--batch", ids[2]], check=True)
    assert "submitted" not in states(submit(run))
    # --- requeued by somebody ---
    wait_until(trains(run, CHUNKS[3]), run)
    subprocess.run(["scontrol", "requeue", ids[3]], check=True)
    # --- a node is drained: its job may end, the next has to go elsewhere ---
    wait_until(trains(run, CHUNKS[4]), run)
    drained = node_of(ids[4])
    subprocess.run(["scontrol", "update", f"nodename={drained}", "state=drain", "reason=test"], check=True)
    wait_until(trains(run, CHUNKS[5]), run)
    assert node_of(ids[5]) != drained
    subprocess.run(["scontrol", "update", f"nodename={drained}", "state=resume"], check=True)
    wait_until(is_queue_empty, run)

    launches = Counter(fields["chunk"] for fields in run.events("started"))
    assert all(launches[chunk] >= 2 for chunk in CHUNKS[:4]), launches
    assert all(launches[chunk] == 1 for chunk in CHUNKS[4:]), launches
    assert_trained_once_and_equal(run, undisturbed, CHUNKS)
    verify = subprocess.run(
        [*PYTHON, "training", *run.arguments("status"), "--verify"], capture_output=True, text=True, check=False
    )
    assert verify.returncode == 0, verify.stdout + verify.stderr
    assert submit(run) == {}
    assert is_queue_empty()


def test_a_job_on_two_nodes_trains_what_one_process_trains_and_is_preempted_in_one_piece(make_run, undisturbed, submit):
    run = make_run("nodes")
    submit(run, "--count", "1", sbatch=("--nodes=2",))

    wait_until(trains(run, CHUNKS[0]), run)
    more_important = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(more_important, check=True)
    wait_until(is_queue_empty, run)

    assert [len(run.events(name)) for name in ("started", "stopped", "chunk_done")] == [2, 1, 1], logs_of(run)
    assert "got signal" not in logs_of(run)  # the launcher was left alone, however long a save takes
    assert json.loads((run.root / "run.json").read_text())["devices"].startswith("2 x ")
    trace = run.rows("trace.jsonl")
    expected = [row for row in undisturbed.rows("trace.jsonl") if row["chunk"] == CHUNKS[0]]
    assert [without_losses(row) for row in trace] == [without_losses(row) for row in expected]
    assert losses(trace) == pytest.approx(losses(expected), rel=1e-5)


def without_losses(row: dict) -> dict:
    return row | {"samples": [sample[:3] for sample in row["samples"]]}


def losses(rows: list[dict]) -> list[float]:
    return [sample[3] for row in rows for sample in row["samples"]]


def test_an_array_trains_as_many_chunks_as_it_has_tasks_when_one_is_requeued(make_run, undisturbed, submit):
    run = make_run("array")
    jobs = submit(run, "--array", "--count", "2")
    assert states(submit(run, "--array", "--count", "2"))[1:] == ["pending", *["not_submitted"] * 4]

    wait_until(trains(run, CHUNKS[0]), run)
    subprocess.run(["scancel", "--signal=USR1", "--batch", jobs[CHUNKS[0]]["job_id"]], check=True)
    wait_until(lambda: bool(run.events("chunk_done")), run, hurry=False)  # by the other task
    wait_until(is_queue_empty, run)

    assert_trained_once_and_equal(run, undisturbed, CHUNKS[:2])
    assert states(submit(run, "--count", "2", "--dry-run")) == ["to_submit"] * 2 + ["not_submitted"] * 2


def test_damaged_data_holds_the_job_and_those_behind_it_wait(make_run, submit):
    run = make_run("damaged")
    (run.root).mkdir()
    (run.root / "ledger.jsonl").write_text("")
    jobs = list(submit(run, "--count", "2", sbatch=("--hold",)).values())
    (run.root / "ledger.jsonl").write_text("no ledger\n")
    subprocess.run(["scontrol", "release", jobs[0]["job_id"], jobs[1]["job_id"]], check=True)

    wait_until(lambda: "held" in logs_of(run), run)
    wait_until(lambda: [entry[1] for entry in queue()] == ["PENDING", "PENDING"], run)

    (run.root / "ledger.jsonl").write_text("")
    assert states(submit(run))[:2] == ["held", "pending"]
    subprocess.run(["scancel", jobs[0]["job_id"]], check=True)
    wait_until(is_queue_empty, run)  # what waited for it is cancelled by Slurm


def test_a_launch_that_is_refused_ends_the_chain_and_it_can_be_submitted_again(make_run, submit):
    run = make_run("refused")
    jobs = submit(run, "--count", "2", "--set", "stage_c.network='nowhere'", sbatch=("--hold",))

    subprocess.run(["scontrol", "release", *(job["job_id"] for job in list(jobs.values())[:2])], check=True)
    wait_until(is_queue_empty, run)

    assert "failed with code 2" in logs_of(run)
    assert states(submit(run, "--count", "2", "--dry-run"))[:2] == ["to_submit", "to_submit"]
