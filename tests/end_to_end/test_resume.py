"""Kill a real training at chosen moments, run the same command again, and compare bit by bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"


def trained(run, name="trace.jsonl"):
    """What was trained, step by step: keys, captions, timesteps, rates and losses."""
    return run.rows(name)


def assert_equal_runs(run, uninterrupted):
    assert trained(run) == trained(uninterrupted)
    for chunk in (FIRST, SECOND):
        assert run.final_files(chunk) == uninterrupted.final_files(chunk), f"weights of {chunk} differ"


def in_a_step(run):
    return lambda: run.last_step() >= 3


def while_a_state_is_written(run):
    folder = run.root / "chunks" / FIRST
    return lambda: any(folder.glob("state-*.partial-*"))


def between_the_final_state_and_its_completion(run):
    folder = run.root / "chunks" / FIRST
    return lambda: (folder / "final" / "manifest.json").exists() and not (folder / "complete.json").exists()


@pytest.mark.parametrize(
    "moment",
    [in_a_step, while_a_state_is_written, between_the_final_state_and_its_completion],
    ids=lambda m: m.__name__,
)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(make_run, uninterrupted, tmp_path, moment):
    run = make_run(tmp_path / "run")

    code = run.launch("--chunk", FIRST).kill_when(moment(run))
    run.train_all()

    assert code == -signal.SIGKILL
    assert_equal_runs(run, uninterrupted)


def told(run):
    """The ledger without what differs between any two runs: hashes, times, digests of files that hold times."""
    left_out = ("manifest_digest", "busy_seconds")
    return [
        (line["event"], {name: value for name, value in line["fields"].items() if name not in left_out})
        for line in run.rows("ledger.jsonl")
    ]


def test_one_process_for_all_chunks_equals_a_launch_per_chunk(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run", "data.workers=1")

    code = run.train("--chunks", "0:")

    assert code == 0, run.log.read_text()
    assert_equal_runs(run, uninterrupted)
    assert told(run) == told(uninterrupted)


def test_a_kill_in_the_second_of_several_chunks_costs_nothing(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run", "data.workers=1")

    code = run.launch("--chunks", f"{FIRST}:{SECOND}").kill_when(lambda: run.last_step() >= 13)
    assert code == -signal.SIGKILL
    assert run.train("--chunks", ":") == 0

    assert_equal_runs(run, uninterrupted)


def test_three_kills_in_one_chunk_with_loader_workers(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run", "data.workers=1")

    for step in (1, 4, 7):
        run.launch("--chunk", FIRST).kill_when(lambda step=step: run.last_step() >= step)
    run.train_all()

    assert_equal_runs(run, uninterrupted)


def test_every_image_is_trained_exactly_once_per_epoch(uninterrupted, real_workspace):
    from sharding.chunk import list_chunks
    from sharding.schema import Workspace

    for chunk in list_chunks(Workspace(real_workspace).chunks):
        planned = sorted(chunk.read_index().column("key").to_pylist())
        for epoch in range(2):
            rows = [row for row in trained(uninterrupted) if row["chunk"] == chunk.name and row["epoch"] == epoch]
            keys = [sample[0] for row in rows for sample in row["samples"]]
            assert sorted(keys) == planned


def test_sigterm_saves_and_ends_with_75_and_the_next_launch_goes_on(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run", "save.every_steps=1000")

    code = run.launch("--chunks", f"{FIRST}:{SECOND}").kill_when(in_a_step(run), signal.SIGTERM)
    last_exit = json.loads((run.root / "last_exit.json").read_text())
    events = [line["event"] for line in run.rows("ledger.jsonl")]
    run.train_all()

    assert code == 75
    assert (last_exit["code"], last_exit["chunk"]) == (75, FIRST)
    assert events[-2:] == ["state_saved", "stopped"]
    assert_equal_runs(run, uninterrupted)


def test_a_stop_file_stops_like_a_signal(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    launch = run.launch("--chunk", FIRST)

    def ask() -> bool:
        if run.last_step() >= 2:
            (run.root / "stop").touch()
            return True
        return False

    code = launch.kill_when(ask, 0)

    assert code == 75
    assert not (run.root / "stop").exists()


def test_a_damaged_newest_state_is_passed_over_aloud(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run")
    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 7)
    states = sorted((run.root / "chunks" / FIRST).glob("state-????????"))
    model = states[-1] / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)

    run.train_all()

    assert len(states) >= 2
    assert f"state {states[-1].name} is not used" in run.log.read_text()
    assert_equal_runs(run, uninterrupted)


def test_a_finished_chunk_answers_at_once_and_changes_nothing(uninterrupted):
    before = (uninterrupted.root / "ledger.jsonl").read_bytes()

    code = uninterrupted.train("--chunk", FIRST)

    assert code == 0
    assert (uninterrupted.root / "ledger.jsonl").read_bytes() == before


def test_metrics_rise_strictly_and_reach_tensorboard_once(make_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path / "run", "trackers.tensorboard=true")
    for step in (3, 6):
        run.launch("--chunk", FIRST).kill_when(lambda step=step: run.last_step() >= step)
    run.train_all()

    steps = [row["global_step"] for row in run.rows("metrics.jsonl")]
    events = EventAccumulator(str(run.root / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    chart = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, len(steps) + 1))
    assert sorted(chart) == sorted(set(chart))
    assert set(chart) <= set(steps)
    assert chart[-1] == steps[-1]


def accelerate_command(run, num_processes: int, *extra: str) -> tuple[list[str], dict[str, str]]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    command += ["--num_processes", str(num_processes), "-m", "training", *run.arguments("run", *extra)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return command, environment


def test_two_processes_train_the_same_sequence_with_the_same_losses(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run")
    command, environment = accelerate_command(run, 2, "--chunk", FIRST, "--processes", "2")

    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    alone = [row for row in trained(uninterrupted) if row["chunk"] == FIRST]
    together = trained(run)
    assert len(together) == len(alone) > 0
    for one, two in zip(alone, together, strict=True):
        assert [s[:3] for s in two["samples"]] == [s[:3] for s in one["samples"]]
        assert [s[3] for s in two["samples"]] == pytest.approx([s[3] for s in one["samples"]], rel=1e-5)
        assert two["rates"] == one["rates"] and two["planned"] == one["planned"]
    started = next(line for line in run.rows("ledger.jsonl") if line["event"] == "started")
    assert started["fields"]["devices"].startswith("2 x ")


def test_a_launcher_that_starts_another_number_of_processes_is_refused(make_run, tmp_path):
    run = make_run(tmp_path / "run")

    code = run.train("--chunk", FIRST, "--processes", "2")

    assert code == 2
    assert "--processes 2: the launcher started 1" in run.log.read_text()


def test_a_changed_setting_is_refused_and_a_free_one_is_not(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    run.launch("--chunk", FIRST).kill_when(in_a_step(run))

    refused = run.train("--chunk", FIRST, "--set", "optimizer.learning_rate=0.5")
    allowed = run.train("--chunk", FIRST, "--set", "save.every_steps=3")

    log = run.log.read_text()
    assert refused == 2
    assert "optimizer.learning_rate: was 0.001, now 0.5" in log
    assert allowed == 0


def test_a_chunk_before_its_parent_is_refused(make_run, tmp_path):
    run = make_run(tmp_path / "run")

    code = run.train("--chunk", SECOND)

    assert code == 3
    assert "real/0000 comes before it and is not complete" in run.log.read_text()


def test_a_finished_chunk_may_be_deleted_before_the_next_is_trained(make_run, uninterrupted, real_workspace, tmp_path):
    shutil.copytree(real_workspace, tmp_path / "workspace")
    run = make_run(tmp_path / "run", f"data.workspace='{tmp_path / 'workspace'}'")
    assert run.train("--chunk", FIRST) == 0
    shutil.rmtree(tmp_path / "workspace" / "chunks" / FIRST)

    again = run.train("--chunk", FIRST)
    code = run.train("--chunk", SECOND)

    assert (again, code) == (0, 0)
    assert_equal_runs(run, uninterrupted)
