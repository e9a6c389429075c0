"""Train chunk after chunk on this machine, one launch each.

    python -m scripts.train_chunks configs/training/demo.toml --run-dir demo/run
    python -m scripts.train_chunks RUN.toml --run-dir R \
        --launcher "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8"

Which chunk is next is asked of the run's ledger before every launch. Ends with 0 when all are done, and with the
code of the launch that failed or was stopped (75) otherwise.
"""

import argparse
import sys
from pathlib import Path

from scripts.launching import find_next, launch_chunk
from training.exit_codes import code_of


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
        try:
            found = find_next(options.config, options.run_dir, options.overrides)
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            return code_of(error)
        print(found.sentence, flush=True)
        if found.chunk is None:
            return 0
        if code := launch_chunk(options.launcher, options.config, options.run_dir, found.chunk, extra):
            return code
        trained += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
