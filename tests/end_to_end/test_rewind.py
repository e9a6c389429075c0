"""A real training goes back and branches off: with the same settings it ends with the bits of one that never did."""

import json
import signal
import time

import pytest

from scripts import resume_from_chunk
from training.cli import main as training
from training.wandb_file import read_history

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"


@pytest.fixture
def resume(monkeypatch, capsys):
    """Return a function that resumes a TinyRun and gives back what was said."""

    def run_it(run, *words):
        def launch(_launcher, _config, root, chunk, _extra):
            again = type(run)(root, run.overrides)
            return again.train("--chunk", chunk)

        monkeypatch.setattr(resume_from_chunk, "launch_chunk", launch)
        code = resume_from_chunk.main(["--run-dir", str(run.root), *words])
        return code, capsys.readouterr().out

    return run_it


def steps_in_tensorboard(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def steps_in_wandb(root, run_id, *, last):
    for _ in range(100):  # W&B's own process may write the end of a file after it has been closed
        files = sorted((root / "wandb").rglob(f"run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime)
        rows = [row for path in files for row in read_history(path) if "train/loss" in row]
        if rows and rows[-1]["_step"] == last:
            break
        time.sleep(0.1)
    return [row["_step"] for row in rows]


def test_a_run_that_goes_back_ends_with_the_same_bits_and_one_series_in_each_tracker(
    make_run, uninterrupted, tmp_path, resume, monkeypatch
):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = make_run(tmp_path / "run", "trackers.tensorboard=true", "trackers.wandb='offline'", "save.every_steps=2")
    assert run.launch("--chunk", FIRST).kill_when(
        lambda: (run.root / "chunks" / FIRST / "state-00000004").exists()
    ) in (-signal.SIGKILL,)
    newest = sorted((run.root / "chunks" / FIRST).glob("state-*[0-9]"))[-1]
    (newest / "facts.json").write_text("{}")

    code, said = resume(run)
    assert (code, f"damaged and passed over: {newest.name} (" in said, "was killed" in said) == (0, True, True)
    assert resume(run)[0] == 0
    last = run.last_step()
    old = json.loads((run.root / "run.json").read_text())["wandb_id"]

    code, said = resume(run, "--rewind", FIRST)

    new = json.loads((run.root / "run.json").read_text())["wandb_id"]
    assert (code, new in said, new != old) == (0, True, True)
    for chunk in (FIRST, SECOND):
        assert run.final_files(chunk) == uninterrupted.final_files(chunk)
    assert run.rows("trace.jsonl") == uninterrupted.rows("trace.jsonl")
    assert steps_in_tensorboard(run.root) == list(range(1, last + 1))
    assert steps_in_wandb(run.root, new, last=last) == list(range(1, last + 1))
    assert training(["status", "--verify", "--run-dir", str(run.root)]) == 0
    assert resume(run)[1].endswith("all 2 chunks are done; nothing to do.\n")


def test_a_branch_with_the_same_settings_ends_with_the_same_bits_and_another_with_others(
    make_run, uninterrupted, tmp_path, resume
):
    words = ("--chunk", FIRST, "--fork")

    code, said = resume(uninterrupted, *words, str(tmp_path / "same"))
    assert (code, "with the same settings" in said) == (0, True)
    run = type(uninterrupted)(tmp_path / "same", uninterrupted.overrides)
    assert run.final_files(SECOND) == uninterrupted.final_files(SECOND)
    assert (
        run.rows("metrics.jsonl")[-1]["train/images_seen"]
        == uninterrupted.rows("metrics.jsonl")[-1]["train/images_seen"]
    )
    assert training(["status", "--verify", "--run-dir", str(run.root)]) == 0

    change = "optimizer.learning_rate=0.002"
    other = make_run(uninterrupted.root, change)
    assert resume(other, *words, str(tmp_path / "other"), "--set", change)[0] == 0
    run = type(other)(tmp_path / "other", other.overrides)
    assert run.final_files(SECOND) != uninterrupted.final_files(SECOND)
    assert training(["status", "--verify", "--run-dir", str(run.root)]) == 0
    assert training(["status", "--verify", "--run-dir", str(uninterrupted.root)]) == 0
