"""Ask a run's ledger what is next, say so in one sentence, and run it.

    python -m scripts.resume_from_chunk --run-dir demo/run

The settings are the run's own frozen run.toml. A half-trained chunk goes on from its newest verified state; otherwise
the next chunk of the run starts from the state of the last finished one. Nobody types a checkpoint's path.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.commands import run
from sharding.config import load_config
from training.campaign import campaign_chunks, next_chunk
from training.config import RunConfig
from training.ledger import chunk_records
from training.run_dir import RunDir


@dataclass(frozen=True)
class Found:
    """What is next. chunk: None when all is done; sentence: what was found and what is done."""

    chunk: str | None
    sentence: str


def find_next(config_path: Path, run_dir: Path, overrides: list[str]) -> Found:
    """Look into ledger and workspace. Raises what reading them raises."""
    config = load_config(config_path, RunConfig, overrides)
    records = chunk_records(RunDir(run_dir).read_ledger())
    names = [chunk.name for chunk in campaign_chunks(config.data.workspace, config.data.chunks)]
    chunk = next_chunk(names, records)
    if chunk is None:
        return Found(None, f"{run_dir}: all {len(names)} chunks are done; nothing to do.")
    place = f"chunk {chunk} ({names.index(chunk) + 1} of {len(names)})"
    record = records.get(chunk)
    if record is None:
        done = names[: names.index(chunk)]
        start = f"from the state of {done[-1]}" if done else "from the weights that run.toml names"
        return Found(chunk, f"{run_dir}: {len(done)} chunks are done; starting {place} {start}.")
    if record.last_state is None:
        return Found(chunk, f"{run_dir}: {place} was started but has no state yet; starting it again.")
    step = record.last_state[1]
    return Found(chunk, f"{run_dir}: {place} is half trained; going on from its state at global step {step:,}.")


def main(argv: list[str] | None = None) -> int:
    from scripts.train_chunks import launch_command

    parser = argparse.ArgumentParser(prog="python -m scripts.resume_from_chunk", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--launcher", default="", help="put before `-m training run …`; default: plain python")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    options = parser.parse_args(argv)
    config_path = RunDir(options.run_dir).config_path
    if not config_path.exists():
        print(f"{options.run_dir}: no run.toml; start it once with `python -m training run`", file=sys.stderr)
        return 2
    found = find_next(config_path, options.run_dir, [])
    print(found.sentence, flush=True)
    if found.chunk is None or options.dry_run:
        return 0
    return run(launch_command(options.launcher, config_path, options.run_dir, found.chunk, []))


if __name__ == "__main__":
    sys.exit(main())
