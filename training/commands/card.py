"""`training card`: the README.md of a model repository."""

import argparse
from pathlib import Path

from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

SUMMARY = "write the README.md of a model repository, from ledger, run.toml and workspace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_config=False)
    parser.add_argument("--output", type=Path, metavar="README.md", help="default: RUN/export/README.md")
    add_card_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a card may be told besides."""
    parser.add_argument(
        "--notes", type=Path, metavar="FILE", help="Markdown: title, release notes, limitations, licence"
    )
    parser.add_argument(
        "--dataset", type=Path, metavar="DATASET.toml", help="settings of the data line: thresholds, dates, models"
    )


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from sharding.config import DatasetConfig, load_config
    from training.card.card import read_facts, render_card, write_card
    from training.card.notes import read_notes
    from training.card.settings import require_licence

    config = run_config(options)
    require_licence(config.save)
    notes = read_notes(options.notes) if options.notes is not None else None
    dataset = load_config(options.dataset, DatasetConfig) if options.dataset is not None else None
    text = render_card(config, read_facts(config, options.run_dir, dataset), notes=notes, dataset=dataset)
    if options.dry_run:
        print(text, end="")
        return DONE
    output = options.output or options.run_dir / "export" / "README.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_card(output, text)
    print(f"{output}: {len(text.splitlines()):,} lines")
    return DONE
