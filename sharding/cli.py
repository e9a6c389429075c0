"""The commands of the data side: `python -m sharding COMMAND DATASET.toml [--workspace W] …`.

Parses, runs one entry of `commands`, prints its answer and turns errors into exit codes:
0 done, 1 failed, 2 bad usage or config, 3 bad data. No logic of its own.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.commands import BAD_DATA, BAD_USAGE, COMMANDS, FAILED, to_json

logger = logging.getLogger(__name__)


def foreign_package(package: str) -> str:
    """Return what is wrong when two installed distributions claim the import name `package`, or ""."""
    from importlib.metadata import packages_distributions

    owners = sorted(set(packages_distributions().get(package, ())))
    if len(owners) < 2:
        return ""
    return f"the import name {package!r} is claimed by {' and '.join(owners)}; uninstall the one that is not chunkline"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if problem := foreign_package("sharding"):
        print(problem, file=sys.stderr)
        return BAD_USAGE
    try:
        options = _parser().parse_args(_join_words(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as stop:  # argparse has printed help or the mistake
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    from sharding.files import unsupported_system
    from sharding.runlog import configure_logging

    if problem := unsupported_system():
        print(f"error: {problem}", file=sys.stderr)
        return BAD_USAGE
    configure_logging(verbose=options.verbose)
    try:
        answer = COMMANDS[options.command].run(options)
        print(to_json(answer.values) if options.json else answer.text)
        return answer.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, OSError) as error:
        return _exit_code(error)
    except Exception:
        logger.exception("%s failed", options.command)
        return FAILED


def _join_words(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the two words of a command such as `dedupe explain` as one."""
    words = " ".join(arguments[:2])
    return [words, *arguments[2:]] if words in COMMANDS else list(arguments)


def _exit_code(error: Exception) -> int:
    """Log an error that a user or a file has caused in one line and return its exit code."""
    from sharding.chunk import ChunkError
    from sharding.images import BrokenFractionError
    from sharding.tables import DamagedPartError

    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    logger.error("%s%s", place, error.strerror if isinstance(error, OSError) and error.strerror else error)
    logger.debug("where", exc_info=error)
    if isinstance(error, (ChunkError, DamagedPartError, BrokenFractionError)):
        return BAD_DATA
    return BAD_USAGE if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError)) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sharding", description="From a heap of images to chunks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        arguments = commands.add_parser(name, help=command.help, description=command.help)
        for positional, what in command.positionals:
            arguments.add_argument(positional, metavar=positional.upper(), help=what)
        if command.takes_config:
            arguments.add_argument("config", type=Path, metavar="DATASET.toml")
            arguments.add_argument("--workspace", type=Path, metavar="W",
                                   help="default: workspace/<name of the dataset>")  # fmt: skip
            arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                                   help="override a setting, e.g. plan.chunk_size=4000; repeatable")  # fmt: skip
        arguments.add_argument("--json", action="store_true", help="print the result as JSON")
        arguments.add_argument("-v", "--verbose", action="store_true", help="log more")
        command.add_options(arguments)
    return parser
