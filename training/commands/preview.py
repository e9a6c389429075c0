"""`training preview`: the run's previews from a state."""

import argparse
from pathlib import Path

from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

SUMMARY = "make the run's previews from the newest state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_config=False)
    parser.add_argument("--chunk", help="a finished chunk whose state is kept; default: the newest state")
    parser.add_argument("--output", type=Path, help="folder; default: RUN/previews")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.use_state import make_previews

    output = options.output or options.run_dir / "previews"
    for line in make_previews(run_config(options), options.run_dir, output, chunk_name=options.chunk):
        print(line)
    return DONE
