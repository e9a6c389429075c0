"""What the command line answers to bad input: one clear line on stderr, the right exit code, nothing changed."""

import json
import subprocess
import sys

import pytest

from sharding.chunk import ChunkError
from sharding.files import DiskFullError
from training.buckets import BucketError
from training.cli import COMMANDS, main
from training.errors import BrokenDataError, NonFiniteError
from training.exit_codes import code_of, is_foreseen
from training.lock import LockHeldError, LockLostError, RunLock
from training.run_dir import RunDir
from training.state_manifest import StateError
from training.weight_files import WeightsError


def refusal(capsys, *arguments) -> tuple[int, str]:
    """Run the command line; return its code and its only line on stderr that is no log line."""
    code = main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return code, lines[0]


def test_a_missing_run_toml_is_named(capsys, tmp_path):
    code, line = refusal(capsys, "run", tmp_path / "nothing.toml", "--run-dir", tmp_path / "run")

    assert code == 2
    assert "nothing.toml" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optimizer.speed=1", "optimizer.speed: unknown key; known here: "),
        ("optimizer.learning_rte=1", "; did you mean learning_rate?"),
        ("optimizer.learning_rate='fast'", "optimizer.learning_rate: input should be a valid number"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate: input should be greater than 0, got -1.0"),
        ("batch.batch_size=5", "batch_size 5 is not a multiple of micro_batch_size 2"),
        ("schedule.name='cosine'", "total_steps"),
        ("buckets.step=48", "buckets.step 48 must be a multiple of 32"),
        ("device='tpu'", "device: input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_it_may_be(capsys, run_toml, tmp_path, override, expected):
    code, line = refusal(capsys, "run", run_toml, "--run-dir", tmp_path / "run", "--set", override)

    assert code == 2
    assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["status", "export"])
def test_a_folder_without_a_run_is_named(capsys, tmp_path, command):
    code, line = refusal(capsys, command, "--run-dir", tmp_path / "nowhere")

    assert code == 2
    assert "so no run was started in" in line


def test_a_chunk_that_does_not_exist_is_bad_data(capsys, run_toml, tmp_path):
    code, line = refusal(capsys, "run", run_toml, "--run-dir", tmp_path / "run", "--chunk", "made/0007")

    assert code == 3
    assert "chunk made/0007: not in this run's data.chunks; there are made/0000, made/0001" in line


def test_a_held_out_chunk_is_refused_as_bad_usage(capsys, run_toml, tmp_path):
    code, line = refusal(capsys, "run", run_toml, "--run-dir", tmp_path / "run", "--chunk", "made/held-out")

    assert code == 2
    assert "chunk made/held-out: it is held out for validation" in line


def test_a_pattern_without_chunks_is_bad_data(capsys, run_toml, tmp_path):
    code, line = refusal(capsys, "run", run_toml, "--run-dir", tmp_path / "run", "--set", "data.chunks=['cats/*']")

    assert code == 3
    assert "'cats/*' matches no chunk" in line


def test_an_early_refusal_is_the_last_exit_of_a_run_folder_that_exists(capsys, run_toml, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.root.mkdir()

    refusal(capsys, "run", run_toml, "--run-dir", run_dir.root, "--chunk", "made/0007")

    assert run_dir.last_exit_code() == 3


def test_a_run_that_another_process_holds_is_left_alone(capsys, run_toml, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    with RunLock.acquire(RunDir(root).lock_path):
        before = sorted(path.name for path in root.rglob("*"))
        code, line = refusal(capsys, "run", run_toml, "--run-dir", root)
        after = sorted(path.name for path in root.rglob("*"))

    assert code == 2
    assert "in use by process" in line and "ask it to stop with `touch" in line
    assert after == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, run_toml, tmp_path):
    code = main(["run", str(run_toml), "--run-dir", str(tmp_path / "run"), "--dry-run"])

    assert code == 0
    assert "made/0000 epoch 0: 1 steps of 2 micro-batches of 2, 4 exposures of 4 samples" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_plan_counts_the_steps_of_the_whole_run(capsys, run_toml):
    code = main(["plan", str(run_toml), "--set", "data.epochs=3"])

    assert code == 0
    assert "the run: 2 chunks, 3 epochs each, 6 steps" in capsys.readouterr().out


def test_status_of_a_run_that_has_not_started(capsys, run_toml, tmp_path):
    code = main(["status", str(run_toml), "--run-dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    json_code = main(["status", str(run_toml), "--run-dir", str(tmp_path / "run"), "--json"])
    value = json.loads(capsys.readouterr().out)

    assert code == json_code == 0
    assert "| **Total** |             0 |         8 |            8 |" in printed
    assert "next: made/0000, not started" in printed and "launch: none is running" in printed
    assert value["images"] == [
        {"name": "cats", "done": 0, "remaining": 6},
        {"name": "dogs", "done": 0, "remaining": 2},
    ]


def test_export_without_a_state_says_so(capsys, run_toml, tmp_path):
    code, line = refusal(capsys, "export", run_toml, "--run-dir", tmp_path / "run")

    assert code == 3
    assert "no state that verifies: there is none" in line


@pytest.mark.parametrize(
    "error, code, foreseen",
    [
        (ChunkError("x"), 3, True),
        (StateError("x"), 3, True),
        (WeightsError("x"), 3, True),
        (BrokenDataError("x"), 3, True),
        (BucketError("too_small", "x"), 3, True),
        (LockHeldError("x"), 2, True),
        (FileNotFoundError("x"), 2, True),
        (ValueError("x"), 2, True),
        (DiskFullError("x"), 1, True),
        (NonFiniteError("x", range(3, 5)), 1, True),
        (LockLostError("x"), 1, True),
        (RuntimeError("x"), 1, False),
        (KeyError("x"), 1, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_its_exit_code(error, code, foreseen):
    assert (code_of(error), is_foreseen(error)) == (code, foreseen)


def test_help_answers_without_torch():
    script = (
        "import sys; from training.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)
