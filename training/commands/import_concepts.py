"""`training import-concepts`: a list of concepts of any trainer, as ours."""

import argparse
import sys
from pathlib import Path

from sharding.config import ConfigError
from sharding.files import write_bytes
from training.exit_codes import DONE

SUMMARY = "read a list of concepts of any trainer, even a broken one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("source", type=Path, help="the list, or a folder with a folder per concept")
    parser.add_argument("--output", type=Path, metavar="TOML", help="write them as ours; default: print")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="where their folders lie here: 'E:\\data=/data'",
    )


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.dreambooth.concepts.reading import import_concepts

    mapped = [(theirs, ours) for theirs, _, ours in (pair.partition("=") for pair in options.map)]
    imported = import_concepts(options.source, mapped=mapped)
    print(f"{options.source}: {imported.kind}, {len(imported.concepts)} concepts", file=sys.stderr)
    for note in imported.notes:
        print(f"  {note}", file=sys.stderr)
    if options.output is None:
        print(imported.toml(), end="")
    elif options.output.absolute() == options.source.absolute():
        raise ConfigError(f"{options.output}: is the list itself; give --output another name")
    elif not options.dry_run:
        write_bytes(options.output, imported.toml().encode())
        print(options.output)
    return DONE
