"""`python -m training`: parses arguments, gives the exit code. What a subcommand does is in `training.commands`."""

import argparse
import importlib
import logging
import os
import sys
from importlib.metadata import packages_distributions

from sharding.files import unsupported_system
from sharding.runlog import configure_logging
from training.exit_codes import BAD_USAGE, code_of, is_foreseen

logger = logging.getLogger(__name__)

COMMANDS = (
    "plan",
    "encode-latents",
    "run",
    "status",
    "dashboard",
    "export",
    "card",
    "merge",
    "extract-lora",
    "resize-lora",
    "preview",
    "create-model",
    "import-concepts",
    "pack-concepts",
    "doctor",
    "doctor-launch",
    "suggest",
    "explain-kohya",
    "import-state",
)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 done, 1 failed, 2 usage, 3 bad data, 75 stopped with state saved."""
    owners = sorted(set(packages_distributions().get("training", [])))
    if len(owners) > 1:
        print(f"the import name 'training' is claimed by {' and '.join(owners)}: uninstall the other", file=sys.stderr)
        return BAD_USAGE
    options = _parser().parse_args(argv)
    if problem := unsupported_system():
        print(f"error: {problem}", file=sys.stderr)
        return BAD_USAGE
    configure_logging(rank=int(os.environ.get("RANK", "0")), verbose=options.verbose)
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "HF_HUB_DISABLE_PROGRESS_BARS", "1"
        )  # transformers heeds it, too: its bars fill log files
    try:
        return int(options.run(options))
    except Exception as error:
        if is_foreseen(error):
            print(f"error: {error}", file=sys.stderr)
            logger.debug("where it came from", exc_info=True)
        else:
            logger.exception("failed: %s", error)
        return code_of(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train one run over many chunks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"training.commands.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
        command.add_argument("-v", "--verbose", action="store_true")
        command.set_defaults(run=module.run)
    return parser
