"""`training card`: the README.md of a model repository."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.files import write_bytes
from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

if TYPE_CHECKING:
    from training.config import RunConfig

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
    text = card_text(run_config(options), options)
    if options.dry_run:
        print(text, end="")
        return DONE
    output = options.output or options.run_dir / "export" / "README.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, text.encode())
    print(f"{output}: {len(text.splitlines()):,} lines")
    return DONE


def card_text(config: "RunConfig", options: argparse.Namespace, *, repository: str | None = None) -> str:
    """Return the card of a run, as the options of `add_card_arguments` say. Raises as `render_card`, `read_notes`."""
    from sharding.config import DatasetConfig, load_config
    from training.card.card import read_facts, render_card
    from training.card.notes import read_notes
    from training.card.settings import require_licence

    require_licence(config.save)
    notes = read_notes(options.notes) if options.notes is not None else None
    dataset = load_config(options.dataset, DatasetConfig) if options.dataset is not None else None
    facts = read_facts(config, options.run_dir, dataset)
    return render_card(config, facts, notes=notes, dataset=dataset, repository=repository)
