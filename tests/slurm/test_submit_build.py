"""The data side as jobs of a real Slurm: the whole chain, a task that is cancelled, submitting again."""

import json
import subprocess
from pathlib import Path

import pytest

from scripts import slurm_queue, submit_build
from sharding.chunk import list_chunks
from sharding.schema import Workspace
from sharding.tables import list_parts

SMALL = "--sbatch=--cpus-per-task=1 --mem=500M"


@pytest.fixture
def submit(dataset, tmp_path, capsys):
    """Return a function that submits the chain of a workspace in tmp_path and returns it by stage."""

    def run(*options: str) -> dict[str, dict]:
        arguments = [str(dataset), "--workspace", str(tmp_path / "ws"), "--num-parts", "2", SMALL, "--json", *options]
        code = submit_build.main(arguments)
        captured = capsys.readouterr()
        run.error = captured.err
        assert code == 0, captured.err
        return {job["stage"]: job for job in json.loads(captured.out)}

    return run


def states(chain: dict[str, dict]) -> dict[str, str]:
    return {stage: job["state"] for stage, job in chain.items()}


def jobs_in_queue() -> list[str]:
    return subprocess.check_output(["squeue", "--noheader", "--array", "--format=%i"], text=True).split()


def logs_of(workspace: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted((workspace / "logs").glob("*.log")))


@pytest.mark.slow
def test_the_whole_line_is_built_by_jobs_and_a_second_submission_changes_nothing(submit, wait_for_queue, tmp_path):
    workspace = Workspace(tmp_path / "ws")

    chain = submit()
    again = submit()
    wait_for_queue()

    assert set(states(chain).values()) == {"submitted"}
    assert set(states(again).values()) == {"queued"}
    assert len(list_parts(workspace.manifest)) == 3
    assert [chunk.info.num_samples for chunk in list_chunks(workspace.chunks)] == 2 * [5, 5, 2], logs_of(workspace.root)
    report = (workspace.root / "logs" / f"report-{chain['report']['job_id']}.log").read_text()
    assert "12 files = 12 packed + 0 dropped" in report
    chunk_json = (workspace.chunks / "photos" / "0001" / "chunk.json").stat()

    later = submit("--from", "plan")
    wait_for_queue()

    assert states(later) == dict.fromkeys(("plan", "pack", "combine", "verify", "report"), "submitted")
    assert (workspace.chunks / "photos" / "0001" / "chunk.json").stat().st_mtime_ns == chunk_json.st_mtime_ns


@pytest.mark.slow
def test_a_killed_task_ends_the_chain_and_submitting_again_goes_on(submit, wait_for_queue, tmp_path):
    workspace = Workspace(tmp_path / "ws")
    chain = submit("--until", "dedupe", "--sbatch", "scan=--hold")
    array = chain["scan"]["job_id"]
    wait_for_queue(chain["list"]["job_id"])

    subprocess.run(["scancel", f"{array}_1"], check=True)
    subprocess.run(["scontrol", "release", array], check=True)
    wait_for_queue()  # Slurm cancels what cannot run any more

    assert [part.name for part in list_parts(workspace.manifest)] == ["part-00000.parquet", "part-00002.parquet"]
    assert not list_parts(workspace.kept)
    before = (workspace.manifest / "part-00000.parquet").stat().st_mtime_ns

    again = submit("--until", "dedupe")
    wait_for_queue()

    assert states(again) == {"list": "submitted", "scan": "submitted", "dedupe": "submitted"}
    assert len(list_parts(workspace.manifest)) == len(list_parts(workspace.kept)) == 3, logs_of(workspace.root)
    assert (workspace.manifest / "part-00000.parquet").stat().st_mtime_ns == before


@pytest.mark.slow
def test_only_those_tasks_of_an_array_are_submitted_that_the_queue_does_not_hold(submit, wait_for_queue, tmp_path):
    workspace = Workspace(tmp_path / "ws")
    chain = submit("--until", "scan", "--sbatch", "scan=--hold")
    array = chain["scan"]["job_id"]
    wait_for_queue(chain["list"]["job_id"])
    subprocess.run(["scancel", f"{array}_1"], check=True)

    again = submit("--until", "dedupe")

    assert states(again) == {"scan": "submitted", "dedupe": "submitted"}
    assert "--array=1" in again["scan"]["command"]
    assert again["dedupe"]["waits_for"] == [f"{array}_0", again["scan"]["job_id"]]

    subprocess.run(["scontrol", "release", array], check=True)
    wait_for_queue()

    assert len(list_parts(workspace.manifest)) == len(list_parts(workspace.kept)) == 3, logs_of(workspace.root)


@pytest.mark.slow
def test_one_task_can_be_submitted_alone(submit, dataset, wait_for_queue, tmp_path):
    workspace = tmp_path / "ws"
    submit("--until", "scan")
    wait_for_queue()
    lost, kept = workspace / "manifest" / "part-00001.parquet", workspace / "manifest" / "part-00000.parquet"
    before = kept.stat().st_mtime_ns
    content = lost.read_bytes()
    lost.unlink()

    command = ["sbatch", "--parsable", "--array=1", "--cpus-per-task=1", "--mem=500M", f"--output={tmp_path}/%A_%a.log"]
    command += ["slurm/scan_array.sbatch", str(dataset), "--workspace", str(workspace), "--num-parts", "2"]
    slurm_queue.run_slurm(command)
    wait_for_queue()

    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before


def test_a_stage_waits_for_an_earlier_one_of_another_submission(submit, wait_for_queue):
    first = submit("--until", "scan", "--sbatch", "list=--hold")

    second = submit("--from", "dedupe", "--until", "annotate")

    assert states(second) == {"list": "queued", "scan": "queued", "dedupe": "submitted", "annotate": "submitted"}
    assert second["dedupe"]["waits_for"] == [first["scan"]["job_id"]]
    subprocess.run(["scancel", *(job["job_id"] for job in first.values())], check=True)
    wait_for_queue()  # what waited for them was cancelled, too


def test_another_number_of_parts_is_refused_while_jobs_are_queued(submit, dataset, tmp_path, capsys):
    submit("--until", "scan", "--sbatch", "list=--hold")

    code = submit_build.main([str(dataset), "--workspace", str(tmp_path / "ws"), "--num-parts", "3"])

    assert code == submit_build.BAD_USAGE
    assert "with --num-parts 2, not 3" in capsys.readouterr().err


def test_another_workspace_is_another_chain(submit, dataset, tmp_path, capsys):
    submit("--until", "dedupe", "--sbatch", "list=--hold")

    code = submit_build.main([str(dataset), "--workspace", str(tmp_path / "other"), "--dry-run", "--json"])

    assert code == 0
    chain = {job["stage"]: job for job in json.loads(capsys.readouterr().out)}
    assert chain["scan"]["state"] == "to_submit"
    assert not (tmp_path / "other").exists()


def test_what_sbatch_refuses_is_said_with_what_was_submitted_before(dataset, tmp_path, capsys):
    arguments = [str(dataset), "--workspace", str(tmp_path / "ws"), "--num-parts", "2", SMALL, "--until", "dedupe"]

    code = submit_build.main([*arguments, "--sbatch", "list=--hold", "--sbatch", "dedupe=--partition=nowhere"])

    error = capsys.readouterr().err
    assert code == submit_build.FAILED
    assert "invalid partition specified: nowhere" in error
    assert "submitted before: list " in error
    job_ids = {job.partition("_")[0] for job in jobs_in_queue()}
    assert len(job_ids) == 2
