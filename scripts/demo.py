"""The whole line on real pictures, in a few minutes on two cores: from a folder to a resumed training.

    python -m scripts.demo

Models are toy-size with random weights (`scripts.demo_models`); pictures are real (`scripts/demo_pictures`). The first
chunk's training is killed half-way with SIGKILL; the resume-from-chunk script finishes it and starts the second.
Running it again does nothing that is already done.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.commands import PYTHON, run, run_all, shown
from scripts.launching import find_next
from sharding.config import load_config
from training.campaign import is_done, read_campaign
from training.chunk_records import chunk_records
from training.config import RunConfig
from training.metrics_file import read_metrics
from training.run_dir import RunDir

DATASET = Path("configs/datasets/demo.toml")
TRAINING = Path("configs/training/demo.toml")
NUM_CHUNKS = 2
NUM_STEPS_BEFORE_KILL = 9
_LAUNCH_TIMEOUT_SECONDS = 600.0


def kill_half_way(command: list[str], run_dir: RunDir, *, at_step: int) -> None:
    """Run a training command and kill it with SIGKILL as soon as its metrics show `at_step`."""
    print(f"\n$ {shown(command)}    # killed with SIGKILL at global step {at_step}", flush=True)
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + _LAUNCH_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if max((row["global_step"] for row in read_metrics(run_dir.metrics_path)), default=0) >= at_step:
            break
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    print(f"killed half-way: exit code {code}" if code < 0 else f"ended by itself with exit code {code}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything the demo needs is here
    config = load_config(TRAINING, RunConfig)
    workspace, run_dir = config.data.workspace, RunDir(Path("demo/run"))
    run_options = ["--run-dir", str(run_dir.root)]

    # --- data side ---
    code = run_all(
        [
            [*PYTHON, "scripts.demo_models", "demo/models"],
            [*PYTHON, "scripts.build_chunks", str(DATASET), "--workspace", str(workspace)],
        ]
    )
    if code:
        return code

    # --- training: the first chunk is killed half-way, then the resume script does the rest ---
    names = read_campaign(workspace, config.data.chunks, run_dir).names[:NUM_CHUNKS]
    if not run_dir.ledger_path.exists():
        first = [*PYTHON, "training", "run", str(TRAINING), *run_options, "--chunk", names[0]]
        kill_half_way(first, run_dir, at_step=NUM_STEPS_BEFORE_KILL)
    while not all(is_done(name, chunk_records(run_dir.read_ledger())) for name in names):
        if code := run([*PYTHON, "scripts.resume_from_chunk", *run_options]):
            return code

    # --- use it ---
    export = run_dir.root / "export"
    if not (export / "stage_c.safetensors").exists():
        code = run_all(
            [
                [*PYTHON, "training", "export", *run_options],
                [*PYTHON, "training", "preview", *run_options, "--output", str(run_dir.root / "previews")],
            ]
        )
    code = code or run([*PYTHON, "training", "status", *run_options])
    if code:
        return code
    print(
        f"""
Everything is in demo/:
  chunks        {workspace / "chunks"}   (python -m sharding report {DATASET} --workspace {workspace})
  weights       {export}
  previews      {run_dir.root / "previews"}
  run           {run_dir.root}   (ledger.jsonl, metrics.jsonl, states)
  TensorBoard   {run_dir.tensorboard_folder}   (tensorboard --logdir {run_dir.tensorboard_folder})

{find_next(run_dir.config_path, run_dir.root, []).sentence}
Next:
  python -m scripts.resume_from_chunk --run-dir {run_dir.root}
""",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
