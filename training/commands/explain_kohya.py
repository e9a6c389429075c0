"""`training explain-kohya`: what a command for kohya's sd-scripts means here, flag by flag."""

import argparse
import json
import shutil
import sys
from pathlib import Path

from sharding.config import ConfigError
from sharding.files import write_bytes
from training.exit_codes import BAD_USAGE, DONE

SUMMARY = "what a command for kohya's sd-scripts means here, flag by flag, and a run.toml that does it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="in quotes; none or -: from a pipe")
    parser.add_argument("--file", type=Path, metavar="FILE", help="a shell script with the command")
    parser.add_argument(
        "--config-file", type=Path, metavar="FILE", help="without a command: kohya's --config_file, or the GUI's JSON"
    )
    parser.add_argument("--script", metavar="NAME", help="with --config-file: whose it is; default: guessed")
    parser.add_argument("--output", type=Path, metavar="RUN.toml", help="the file to write; never over another")
    parser.add_argument("--workspace", default="workspace/kohya", metavar="W", help="default: %(default)s")
    parser.add_argument("--chunks", default="kohya/*", metavar="PATTERN", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--strict", action="store_true", help="exit code 2 when a flag is not known")
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.kohya.explanation import explain
    from training.kohya.printed import explanation_text, explanation_values
    from training.kohya.run_toml import run_toml
    from training.kohya.sources import given_by_command, given_by_file

    if options.config_file is None:
        given = given_by_command(_command_text(options))
    elif options.command is None and options.file is None:
        given = given_by_file(options.config_file, script=options.script)
    else:
        raise ConfigError("--config-file stands for a command: give no other")
    found = explain(
        given, workspace=options.workspace, chunks=options.chunks, overrides=options.overrides,
        run_toml=str(options.output or "run.toml"),
    )  # fmt: skip
    if options.json:
        print(json.dumps(explanation_values(found), indent=2))
    else:
        print(explanation_text(found, width=shutil.get_terminal_size((160, 24)).columns))
    if options.output is not None:
        text = run_toml(found)
        if options.output.exists():
            raise ConfigError(f"{options.output}: is there already; choose another --output")
        if not options.dry_run:
            write_bytes(options.output, text.encode())
            print(f"written: {options.output}", file=sys.stderr)
    return BAD_USAGE if options.strict and found.unknown else DONE


def _command_text(options: argparse.Namespace) -> str:
    if options.file is not None and options.command is not None:
        raise ConfigError("COMMAND and --file exclude each other")
    if options.file is not None:
        try:
            return str(options.file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{options.file}: no such file") from None
    if options.command not in (None, "-"):
        return str(options.command)
    if options.command is None and sys.stdin.isatty():
        raise ConfigError('give the command in quotes, --file FILE, or a pipe: explain-kohya "accelerate launch …"')
    return sys.stdin.read()
