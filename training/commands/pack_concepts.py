"""`training pack-concepts`: the pictures of a DreamBooth run's concepts, packed into a chunk for each stage."""

import argparse
from pathlib import Path

from training.commands.common import run_config
from training.exit_codes import DONE

SUMMARY = "pack a DreamBooth run's concepts, with their class images, into a chunk for each stage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("config", type=Path, metavar="RUN.toml", help="settings of the run, with dreambooth.concepts")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.dreambooth.packing.pack import pack_concepts

    report = pack_concepts(run_config(options), run_toml=str(options.config), dry_run=options.dry_run)
    print(report.text())
    return DONE
