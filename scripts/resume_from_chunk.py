"""Ask a run's ledger what is next, say so in one sentence, and run it.

    python -m scripts.resume_from_chunk --run-dir demo/run

The settings are the run's own frozen run.toml. A half-trained chunk goes on from its newest verified state; otherwise
the next chunk of the run starts from the state of the last finished one. Nobody types a checkpoint's path.
"""

import argparse
import sys
from pathlib import Path

from scripts.launching import find_next, launch_chunk
from training.exit_codes import code_of
from training.run_dir import RunDir


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.resume_from_chunk", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--launcher", default="", help="put before `-m training run …`; default: plain python")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    options = parser.parse_args(argv)
    config_path = RunDir(options.run_dir).config_path
    if not config_path.exists():
        print(f"error: {options.run_dir}: no run.toml; start it with `python -m training run` first", file=sys.stderr)
        return 2
    try:
        found = find_next(config_path, options.run_dir, [])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return code_of(error)
    print(found.sentence, flush=True)
    if found.chunk is None or options.dry_run:
        return 0
    return launch_chunk(options.launcher, config_path, options.run_dir, found.chunk, [])


if __name__ == "__main__":
    sys.exit(main())
