"""Find out which chunk of a run is next, and launch its training."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from scripts.commands import PYTHON, run
from sharding.config import load_config
from training.campaign import read_campaign
from training.chunk_records import parent_of
from training.config import RunConfig
from training.run_dir import RunDir
from training.stages import epochs_of


@dataclass(frozen=True)
class Found:
    """What is next. chunk: None when all is done; sentence: what was found and what is done about it."""

    chunk: str | None
    sentence: str


def find_next(config_path: Path, run_dir: Path, overrides: list[str]) -> Found:
    """Look into ledger and workspace. Raises ConfigError, ChunkError, LedgerError, FileNotFoundError."""
    config = load_config(config_path, RunConfig, overrides)
    campaign = read_campaign(config.data.workspace, config.data.chunks, RunDir(run_dir), epochs=epochs_of(config))
    names, chunk = campaign.names, campaign.next
    if chunk is None:
        return Found(None, f"{run_dir}: all {len(names)} chunks are done; nothing to do.")
    place = f"chunk {chunk} ({names.index(chunk) + 1} of {len(names)})"
    record = campaign.records.get(chunk)
    if record is None or record.status != "running":
        done = [name for name in names if campaign.is_done(name)]
        parent = parent_of(campaign.lines, chunk)
        start = f"from the state of {parent}" if parent else "from the weights that run.toml names"
        return Found(chunk, f"{run_dir}: {len(done)} chunks are done; starting {place} {start}.")
    if record.last_state is None:
        return Found(chunk, f"{run_dir}: {place} was started but has no state yet; starting it again.")
    step = record.last_state.global_step
    return Found(chunk, f"{run_dir}: {place} is half trained; going on from its state at global step {step:,}.")


def launch_chunk(launcher: str, config: Path, run_dir: Path, chunk: str, extra: list[str]) -> int:
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
