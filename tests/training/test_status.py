"""What `training status` says while a launch is at work, after one was killed, and where nobody may write."""

import json
import os
import re
import time

import pytest

from tests.training.conftest import RUN_TOML, make_chunk
from tests.training.paper_run import PaperRun
from training import run_dir as run_dir_module
from training.cli import main
from training.extend import extension_of, rate_text
from training.frozen_config import Change
from training.lock import RunLock, holder_state
from training.status import read_status, status_json, status_text


@pytest.fixture
def run(tmp_path):
    """made/0000 is trained, made/0001 half: one of its two steps."""
    for number in range(3):
        make_chunk(tmp_path / "workspace", number)
    toml = tmp_path / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=tmp_path / "workspace"))
    run = PaperRun(toml, tmp_path / "run", "batch.batch_size=2")
    campaign = run.campaign()
    run.train("made/0000", campaign)

    def stop(folder, position, digests, save=run.save):
        save(folder, position, digests)
        raise KeyboardInterrupt

    run.save = stop
    with pytest.raises(KeyboardInterrupt):
        run.train("made/0001", campaign)
    return run


def test_a_live_launch_is_named_and_the_half_trained_chunk_with_what_a_kill_would_lose(run):
    with (run.run_dir.metrics_path).open("a") as stream:
        stream.write(json.dumps({"global_step": 4, "chunk": "made/0001", "epoch": 0, "step": 1}) + "\n" + '{"global')
    with RunLock.acquire(run.run_dir.lock_path) as lock:
        status = read_status(run.config, run.run_dir.root)
        text = status_text(status, now=0.0)

    assert status.live is not None and status.live.is_live and status.live.holder == lock.holder
    assert f"launch: process {os.getpid()} on " in text and "last heartbeat 0 s ago" in text
    assert "next: made/0001, half trained: step 2 of 2 (100%), saved up to step 1" in text
    assert "6 images left to show, 0.25 s each" in text and "until 1970-01-01 00:0" in text
    value = json.loads(status_json(status))
    assert value["current"] == {"name": "made/0001", "saved_steps": 1, "steps_done": 2, "steps": 2}
    assert (value["eta"]["showings_left"], value["eta"]["busy_seconds_per_image"]) == (6, 0.25)


def test_gpu_hours_are_those_of_all_devices(tmp_path, monkeypatch):
    make_chunk(tmp_path / "workspace", 0)
    toml = tmp_path / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=tmp_path / "workspace"))
    monkeypatch.setattr(PaperRun, "devices", "8 x paper")
    run = PaperRun(toml, tmp_path / "run")
    run.train_all()

    status = read_status(run.config, run.run_dir.root)

    assert status.gpu_hours == pytest.approx(8 * status.totals.busy_seconds / 3600) != 0
    assert json.loads(status_json(status))["gpu_hours"] == status.gpu_hours
    assert f"GPU hours: {status.gpu_hours:,.2f}" in status_text(status)


def test_the_lock_of_a_killed_launch_is_not_live(run, monkeypatch):
    lock = RunLock.acquire(run.run_dir.lock_path)
    lock._ended.set()  # its heartbeat ends, as that of a killed process
    monkeypatch.setattr("training.launch_identity.process_start", lambda pid: "later")  # another has its number now

    state = holder_state(run.run_dir.lock_path)

    assert state is not None and not state.is_live
    assert f"launch: none is running; process {os.getpid()} on" in status_text(
        read_status(run.config, run.run_dir.root)
    )
    assert f"was killed: process number {os.getpid()} is another process now" in str(state)


def test_status_writes_nothing(run, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in run.run_dir.root.rglob("*")}
    monkeypatch.setattr(run_dir_module, "write_json", lambda *_: pytest.fail("written"))

    assert main(["status", str(run.run_dir.root.parent / "run.toml"), "--run-dir", str(run.run_dir.root)]) == 0

    assert {path: path.stat().st_mtime_ns for path in run.run_dir.root.rglob("*")} == before


def test_a_done_chunk_is_counted_without_its_index(run):
    index = run.run_dir.chunk_folder("made/0000") / "index.parquet"
    index.unlink()

    status = read_status(run.config, run.run_dir.root)

    assert [(row.name, row.done, row.remaining) for row in status.images] == [("cats", 3, 6), ("dogs", 1, 2)]


def test_a_second_launch_is_refused_and_told_who_holds_the_run(run, capsys):
    toml = run.run_dir.root.parent / "run.toml"
    with RunLock.acquire(run.run_dir.lock_path):
        code = main(["run", str(toml), "--run-dir", str(run.run_dir.root)])

    error = capsys.readouterr().err
    assert code == 2
    assert f"in use by process {os.getpid()} on" in error and "touch" in error


def test_status_of_many_chunks_is_quick(run):
    started = time.process_time()
    read_status(run.config, run.run_dir.root)

    assert time.process_time() - started < 1.0


# --- what an extension says ---


@pytest.mark.parametrize(
    ("schedule", "was", "expected"),
    [
        ({"name": "constant"}, None, "learning rate: 1 of its peak from global step 50 on (schedule constant has no"),
        ({"name": "linear", "total_steps": 100}, None, "0.5 of its peak .* its horizon stays 100 steps; raise"),
        ({"name": "linear", "total_steps": 100}, 50, "0.5 of its peak .*, was 0 .*horizon 50 -> 100 steps"),
        ({"name": "linear", "total_steps": 40, "end_fraction": 0.1}, None, "0.1 of its peak"),
    ],
)
def test_the_rate_that_applies_is_said(schedule, was, expected):
    schedule = {"warmup_steps": 0, "total_steps": None, "end_fraction": 0.0} | schedule

    assert re.search(expected.replace("(", r"\("), rate_text(schedule, was_total_steps=was, global_step=50))


def test_what_is_new_is_listed_shortly():
    changes = {"data.epochs": Change(1, 2, True), "save.keep_states": Change(2, 3)}

    extension = extension_of(changes, known_chunks=["a/0"], chunks=["a/0", *(f"b/{n}" for n in range(7))])

    assert extension and len(extension.chunks) == 7
    assert extension.reason == "data.epochs 1 -> 2; 7 chunks appended: b/0, b/1, b/2, b/3, b/4, …"
    assert not extension_of({}, known_chunks=None, chunks=["a/0"])
    assert not extension_of({}, known_chunks=["a/0", "a/1"], chunks=["a/0"])
