"""Find out which chunk of a run is next, and launch its training on this machine."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from scripts.commands import PYTHON, run
from sharding.config import load_config
from training.config import RunConfig
from training.next_launch import NextLaunch, next_launch
from training.run_dir import RunDir


def find_next(config_path: Path, run_dir: Path, overrides: Sequence[str], *, is_verifying: bool = False) -> NextLaunch:
    """Return what is next with the settings of a file. Raises what `load_config` and `next_launch` raise."""
    return next_launch(load_config(config_path, RunConfig, list(overrides)), run_dir, is_verifying=is_verifying)


def launch_chunk(launcher: str, config: Path, run_dir: Path, chunk: str, extra: Sequence[str]) -> int:
    """Train one chunk and return its exit code.

    launcher: stands before `-m training run …`; "" is plain python. A launcher such as `accelerate launch` turns every
    code into 1, so the code is then the one that rank 0 wrote to last_exit.json; 1 when it wrote none.
    """
    start = [*PYTHON, "training"] if not launcher else [*shlex.split(launcher), "-m", "training"]
    command = [*start, "run", str(config), "--run-dir", str(run_dir), "--chunk", chunk, *extra]
    if not launcher:
        return run(command)
    RunDir(run_dir).clear_last_exit()
    return run(command) and RunDir(run_dir).last_exit_code()
