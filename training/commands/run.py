"""`training run`: train a chunk, or several."""

import argparse

from training.commands.common import add_run_arguments, run_config

SUMMARY = "train a chunk, or several; run the same command again to resume"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser)
    parser.add_argument("--chunk", help="default: the first chunk of the run that is not done")
    parser.add_argument(
        "--chunks", metavar="A:B", help="from chunk A to B, both included, in one process; names or numbers from 0"
    )
    parser.add_argument("--processes", type=int, help="refuse to start unless the launcher started this many")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.launch import launch

    return launch(
        run_config(options),
        options.run_dir,
        chunk_name=options.chunk,
        chunks=options.chunks,
        num_processes=options.processes,
        dry_run=options.dry_run,
    )
