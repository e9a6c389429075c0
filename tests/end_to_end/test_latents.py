"""Encoding ahead and training from it, in real launches that are killed: the same bits as from pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tiny_run import ROOT, Launch

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"


def small_parts() -> None:
    """In a launched process: parts of four pictures, so that there is something between them."""
    from training.latents import wanted

    wanted.PART_SIZE = 4


def read_the_text_encoder_once() -> None:
    """In a launched process: the one reading is for the digest; whoever needs the model itself fails."""
    small_parts()
    import training.stage_c.conditioning

    load, calls = training.stage_c.conditioning.load_text_model, []

    def once(*arguments):
        calls.append(arguments)
        assert len(calls) == 1, "the text encoder is loaded to train"
        return load(*arguments)

    training.stage_c.conditioning.load_text_model = once


def encode(run, *extra, kill_when=None, prepare=small_parts):
    words = [word for override in run.overrides for word in ("--set", override)]
    arguments = ["encode-latents", run.arguments("run")[1], *words, *extra]
    run.root.parent.mkdir(parents=True, exist_ok=True)
    launch = Launch(arguments, run.log, prepare=prepare)
    return launch.wait() if kill_when is None else launch.kill_when(kill_when)


def losses(run):
    return [row["train/loss"] for row in run.rows("metrics.jsonl")]


@pytest.fixture(scope="module")
def ahead(make_run, tmp_path_factory):
    """Return a function that makes a run whose latents lie in a folder of their own."""

    def make(name, *more):
        root = tmp_path_factory.mktemp("ahead")
        return make_run(
            root / name, f"latents.folder='{root / 'latents'}'", "latents.use=true", *more
        ), root / "latents"

    return make


def train(run, *extra):
    return run.train(*extra, prepare=small_parts)


def test_with_fp32_a_killed_encoding_and_a_killed_run_end_in_the_bits_of_one_from_pixels(ahead, uninterrupted):
    run, folder = ahead("run", "latents.dtype='fp32'")

    def done():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("part-*.json")}

    encode(run, kill_when=lambda: len(done()) >= 2)
    survived = done()
    assert encode(run) == 0, run.log.read_text()
    assert survived.items() <= done().items()
    assert len(list(folder.rglob("part-*.json"))) == 10

    launch = run.launch("--chunk", FIRST, prepare=small_parts)
    launch.kill_when(lambda: run.last_step() >= 3)
    assert train(run, "--chunks", ":") == 0, run.log.read_text()

    assert losses(run) == losses(uninterrupted)
    for chunk in (FIRST, SECOND):
        assert run.final_files(chunk) == uninterrupted.final_files(chunk)
    assert (
        json.loads((run.root / "run.json").read_text())["frozen_weights"]
        == json.loads((uninterrupted.root / "run.json").read_text())["frozen_weights"]
    )


def test_bf16_latents_train_the_same_list_with_almost_the_same_losses(ahead, uninterrupted):
    run, _ = ahead("run", "latents.dtype='bf16'")
    assert encode(run, "--chunk", FIRST) == 0, run.log.read_text()

    assert train(run, "--chunk", FIRST) == 0, run.log.read_text()

    def trained(of):
        return [(row["planned"], [one[:3] for one in row["samples"]], row["rates"]) for row in of.rows("trace.jsonl")]

    assert trained(run) == trained(uninterrupted)[: len(trained(run))]
    pairs = list(zip(losses(run), losses(uninterrupted), strict=False))
    assert all(one == pytest.approx(other, rel=0.01) for one, other in pairs)
    assert any(one != other for one, other in pairs)


def test_text_outputs_made_ahead_train_the_same_bits_without_the_text_encoder(ahead, make_run, tmp_path):
    settings = ("caption.shuffle=false", "preview.prompts=[]", "save.export_every_chunks=0")
    plain = make_run(tmp_path / "plain", *settings)
    assert plain.train("--chunk", FIRST) == 0, plain.log.read_text()
    run, _ = ahead("run", "latents.dtype='fp32'", "latents.text=true", *settings)
    assert encode(run, "--chunk", FIRST) == 0, run.log.read_text()

    assert run.train("--chunk", FIRST, prepare=read_the_text_encoder_once) == 0, run.log.read_text()

    assert losses(run) == losses(plain)
    assert run.final_files(FIRST) == plain.final_files(FIRST)


def test_the_array_job_makes_the_share_of_its_task(ahead):
    run, folder = ahead("run")
    words = [word for override in run.overrides for word in ("--set", override)]
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "0"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    done = subprocess.run(
        ["bash", "slurm/encode_array.sbatch", run.arguments("run")[1], "--num-parts", "2", *words],
        cwd=ROOT, env=os.environ | job | {"PATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 parts made\n")  # of two chunks of one part each
    assert [one.parents[1].name for one in folder.rglob("part-*.json")] == ["0001"]


def test_missing_latents_end_the_launch_with_code_3_and_the_command(ahead):
    run, _ = ahead("run")

    assert train(run, "--chunk", FIRST) == 3

    (line,) = run.errors()
    assert "run `python -m training encode-latents RUN.toml --chunk real/0000`" in line


def test_several_processes_train_from_latents_what_one_does(ahead, uninterrupted):
    run, _ = ahead("run", "latents.dtype='fp32'")
    for task in ("0", "1"):
        assert encode(run, "--chunk", FIRST, "--part-index", task, "--num-parts", "2", prepare=None) == 0

    assert run.train_on(2, "--chunk", FIRST) == [0, 0]

    assert losses(run) == pytest.approx(losses(uninterrupted)[: len(losses(run))], rel=1e-5)
