"""Train chunk after chunk on this machine, one launch each.

    python -m scripts.train_chunks configs/training/demo.toml --run-dir demo/run
    python -m scripts.train_chunks RUN.toml --run-dir R \
        --launcher "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8"

Which chunk is next is asked of the run's ledger before every launch. Ends with 0 when all are done, and with the
code of the launch that failed or was stopped (75) otherwise.
"""

import argparse
import shlex
import sys
from pathlib import Path

from scripts.commands import PYTHON, run
from scripts.resume_from_chunk import find_next


def launch_command(launcher: str, config: Path, run_dir: Path, chunk: str, extra: list[str]) -> list[str]:
    """Return the command that trains one chunk, with or without a launcher such as `accelerate launch …`."""
    start = [*PYTHON, "training"] if not launcher else [*shlex.split(launcher), "-m", "training"]
    return [*start, "run", str(config), "--run-dir", str(run_dir), "--chunk", chunk, *extra]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_chunks", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="RUN.toml")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--count", type=int, help="at most this many chunks")
    parser.add_argument("--launcher", default="", help="put before `-m training run …`; default: plain python")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args(argv)
    extra = [word for override in options.overrides for word in ("--set", override)]
    trained = 0
    while options.count is None or trained < options.count:
        found = find_next(options.config, options.run_dir, options.overrides)
        print(found.sentence)
        if found.chunk is None:
            return 0
        if code := run(launch_command(options.launcher, options.config, options.run_dir, found.chunk, extra)):
            return code
        trained += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
