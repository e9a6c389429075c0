"""`training suggest`: a commented run.toml for a file of concepts and a card."""

import argparse
import sys
from pathlib import Path

from sharding.config import ConfigError
from sharding.files import write_bytes
from training.exit_codes import DONE

SUMMARY = "write a commented run.toml for a file of DreamBooth concepts and a card's memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("concepts", type=Path, metavar="CONCEPTS", help="file of [[concepts]]; see import-concepts")
    parser.add_argument("--vram", type=float, required=True, metavar="GB", help="memory of the card")
    parser.add_argument("--model", help="file, diffusers folder or hub id to start from; default: the wiki's example")
    parser.add_argument("--output", type=Path, metavar="RUN.toml", help="never over another; default: print")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    if not options.vram > 0:
        raise ConfigError(f"--vram {options.vram:g}: must be the card's memory in GB, such as 10")
    if options.output is not None and options.output.exists():
        raise ConfigError(f"{options.output}: is there already; choose another --output")
    from training.dreambooth.suggest.suggestion import suggest

    found = suggest(options.concepts, vram_gb=options.vram, model=options.model)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.output is None:
        print(found.text, end="")
    elif not options.dry_run:
        write_bytes(options.output, found.text.replace("THIS_FILE", str(options.output)).encode())
        print(f"written: {options.output}", file=sys.stderr)
    return DONE
