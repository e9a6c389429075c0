"""`training status`: what is trained and what remains, and the proof of it."""

import argparse
import json
import sys

from training.commands.common import add_run_arguments, run_config
from training.exit_codes import BAD_DATA, DONE

SUMMARY = "show what is trained and what remains"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_config=False)
    parser.add_argument(
        "--verify", action="store_true", help="prove that each image was trained as often as planned; code 3 when not"
    )
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="show it again every 5 seconds; Ctrl-C ends it",
    )
    parser.add_argument("--json", action="store_true", help="the same numbers for programs")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    if options.watch is not None:
        return _watch(options)
    if options.verify:
        from training.verify_run import verify_run

        proof = verify_run(run_config(options), options.run_dir)
        print(json.dumps(proof.values(), indent=2) if options.json else proof.text())
        return BAD_DATA if proof.problems else DONE
    from training.status import read_status, status_json, status_text

    status = read_status(run_config(options), options.run_dir)
    print(status_json(status) if options.json else status_text(status))
    return DONE


def _watch(options: argparse.Namespace) -> int:
    if options.verify or options.json or options.config is not None or options.overrides:
        raise ValueError(
            "--watch: goes with --run-dir alone, without RUN.toml, --set, --verify and --json; leave them out"
        )
    if options.watch <= 0:
        raise ValueError(f"--watch {options.watch:g}: must be more than 0 seconds")
    from training.status_watch import watch

    looks = 1 if options.dry_run else None
    watch(options.run_dir, sys.stdout, seconds=options.watch, is_terminal=sys.stdout.isatty(), num_looks=looks)
    return DONE
