"""What resume_from_chunk and train_chunks say and give back; the launches themselves are stand-ins."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from scripts import resume_from_chunk, train_chunks
from scripts.launching import find_next, launch_chunk
from sharding.chunk import commit_chunk, write_shard
from sharding.config import load_config
from training.config import RunConfig
from training.frozen_config import to_toml
from training.run_dir import RunDir

TOML = """
name = "tiny"
[data]
workspace = "{workspace}"
chunks = ["made/*"]
[stage_c]
network = "none"
text_encoder = "none"
effnet = "none"
"""


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run folder with its run.toml, and a workspace of two empty chunks."""
    for number in range(2):
        folder = tmp_path / "workspace" / "chunks" / "made" / f"{number:04d}"
        shard, rows = write_shard(folder, 0, [])
        facts = {"policy": "p", "shard_policy": "p", "made_from": "test", "seed": 0}
        commit_chunk(folder, rows, name=f"made/{number:04d}", shards=[shard], **facts)
    run_dir = RunDir(tmp_path / "run")
    run_dir.root.mkdir()
    run_dir.config_path.write_text(TOML.format(workspace=tmp_path / "workspace"))
    config = load_config(run_dir.config_path, RunConfig)
    run_dir.config_path.write_text(to_toml(config.model_dump(mode="json")))
    return run_dir


def start(run: RunDir, chunk: str) -> None:
    run.open_ledger(guard=lambda: None).append(
        "started", chunk=chunk, position_in_run=0, parent=None, chunk_digest="", plan_digest="", epochs=1, steps=9,
        images_planned=4, global_step=0, resumed_from=None, devices="",
    )  # fmt: skip


def save(run: RunDir, chunk: str, event: str, global_step: int) -> None:
    run.open_ledger(guard=lambda: None).append(
        event, chunk=chunk, path="p", manifest_digest="", epoch=0, step=0, global_step=global_step,
        images_trained=4, applied_updates=1, busy_seconds=1.0,
    )  # fmt: skip


def said(run: RunDir) -> str:
    """The sentence; that states are as the ledger says is tested on real ones."""
    return find_next(run.config_path, run.root, []).sentence.removeprefix(f"{run.root}: ")


def test_one_sentence_says_what_was_found(run):
    assert said(run) == ("0 chunks are done; starting chunk made/0000 (1 of 2) from the weights that run.toml names.")
    start(run, "made/0000")
    assert said(run) == "chunk made/0000 (1 of 2) was started but has no state yet; starting it again."
    save(run, "made/0000", "state_saved", 5)
    assert said(run) == "chunk made/0000 (1 of 2) is half trained; going on from its state at global step 5."
    save(run, "made/0000", "chunk_done", 9)
    assert said(run) == "1 chunks are done; starting chunk made/0001 (2 of 2) from the state of made/0000."
    start(run, "made/0001")
    save(run, "made/0001", "chunk_done", 18)
    assert said(run) == "all 2 chunks are done; nothing to do."


def launcher(tmp_path: Path, body: str) -> str:
    """Return a launcher that does `body` and then, like `accelerate launch`, ends with 1."""
    path = tmp_path / "launcher.py"
    path.write_text(f"import sys\n{body}\nsys.exit(1)\n")
    return shlex.join([sys.executable, str(path)])


def test_the_true_exit_code_comes_back_through_a_launcher(run, tmp_path):
    written = "from pathlib import Path; from training.run_dir import RunDir\n"
    written += f"RunDir(Path({str(run.root)!r})).write_last_exit(75)"
    command = launcher(tmp_path, f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{written}")

    code = launch_chunk(command, run.config_path, run.root, "made/0000", [])

    assert code == 75


def test_a_launcher_that_dies_without_a_word_is_a_failure(run, tmp_path):
    run.write_last_exit(75)  # of an earlier launch

    code = launch_chunk(launcher(tmp_path, ""), run.config_path, run.root, "made/0000", [])

    assert code == 1


def test_train_chunks_ends_with_the_code_of_the_launch_that_failed(run):
    code = train_chunks.main([str(run.config_path), "--run-dir", str(run.root), "--set", "stage_c.network='gone'"])

    assert code == 2


def test_bad_input_is_one_line_and_no_launch(run, capsys, tmp_path):
    assert resume_from_chunk.main(["--run-dir", str(tmp_path / "nowhere")]) == 2
    assert "no run.toml; start it with" in capsys.readouterr().err

    assert train_chunks.main([str(tmp_path / "none.toml"), "--run-dir", str(run.root)]) == 2
    assert "none.toml: no such config file" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "workspace")
    assert resume_from_chunk.main(["--run-dir", str(run.root)]) == 3
    assert "matches no chunk" in capsys.readouterr().err
