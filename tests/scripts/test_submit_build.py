"""submit_build without a Slurm: what it refuses, what it prints."""

import json
import shlex
from pathlib import Path

import pytest

from scripts import submit_build

DATASET = "configs/datasets/demo.toml"


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.chdir(submit_build.ROOT)


def test_without_slurm_it_says_where_to_run_it(tmp_path, capsys):
    assert submit_build.main([DATASET, "--workspace", str(tmp_path / "ws")]) == submit_build.FAILED

    error = capsys.readouterr().err
    assert "squeue: not found; run this on a login node" in error
    assert "scripts.build_chunks" in error


def test_a_dry_run_prints_the_chain_without_slurm_and_writes_nothing(tmp_path, capsys):
    workspace = tmp_path / "ws"

    code = submit_build.main([DATASET, "--workspace", str(workspace), "--num-parts", "3", "--dry-run", "--json"])

    chain = {job["stage"]: job for job in json.loads(capsys.readouterr().out)}
    assert code == 0
    assert tuple(chain) == submit_build.CHAIN
    assert "--array=0-2" in chain["pack"]["command"]
    assert "--dependency=afterok:<plan>" in chain["pack"]["command"]
    assert shlex.join(chain["pack"]["command"]).endswith(
        f"slurm/pack_array.sbatch {DATASET} --workspace {workspace} --num-parts 3"
    )
    assert not workspace.exists()


def test_one_task_needs_no_listing_beforehand(tmp_path, capsys):
    submit_build.main([DATASET, "--workspace", str(tmp_path), "--num-parts", "1", "--dry-run", "--json"])

    assert json.loads(capsys.readouterr().out)[0]["stage"] == "scan"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-parts", "0"], "--num-parts must be at least 1, got 0"),
        (["--from", "pack", "--until", "plan"], "--from pack comes after --until plan"),
        (["--sbatch", "train=--mem=1G"], "--sbatch 'train=--mem=1G': expected OPTIONS or STAGE=OPTIONS"),
        (["--set", "plan.chunk_size=0"], "plan.chunk_size"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, capsys):
    assert submit_build.main([DATASET, "--workspace", str(tmp_path), "--dry-run", *options]) == submit_build.BAD_USAGE
    assert message in capsys.readouterr().err


def test_every_sbatch_file_is_one_command_in_the_environment_of_the_site():
    for path in sorted(Path("slurm").glob("*.sbatch")):
        code = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert code[:3] == ["set -euo pipefail", 'cd "$SLURM_SUBMIT_DIR"', "source slurm/env.sh"], path
        assert code[-1].startswith("exec python -m "), path
        assert len(code) <= 5 or path.name == "train_chunk.sbatch", path  # rendezvous and signals are the shell's work
