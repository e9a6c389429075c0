"""`training import-state`: a state of kohya's stage C trainer as the first one of a run."""

import argparse
from pathlib import Path

from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

SUMMARY = "take over weights and optimizer of kohya's stage C trainer as the run's first state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("source", type=Path, metavar="KOHYA", help="a NAME-state folder, or NAME.safetensors")
    add_run_arguments(parser)
    parser.add_argument("--step", type=int, default=0, metavar="N", help="global step it is at (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.kohya.import_state import import_state

    config = run_config(options)
    for line in import_state(config, options.run_dir, options.source, step=options.step, dry_run=options.dry_run):
        print(line, flush=True)
    return DONE
