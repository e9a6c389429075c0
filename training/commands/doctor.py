"""`training doctor`: a concepts list's pictures and captions against the wiki's rules."""

import argparse
import sys
from pathlib import Path

from sharding.files import write_bytes, write_json
from training.exit_codes import BAD_DATA, DONE

SUMMARY = "measure a DreamBooth data set against the wiki's rules; exit code 3 when one fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("concepts", type=Path, help="a list of concepts of any trainer, or a folder with them")
    parser.add_argument("--rules", type=Path, metavar="TOML", help="limits that differ from the builtin ones")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="of the rules"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and findings")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.dreambooth.concepts.reading import import_concepts
    from training.dreambooth.doctor.examination import examine
    from training.dreambooth.doctor.page import render_page
    from training.dreambooth.doctor.report import json_report, text_report
    from training.dreambooth.doctor.rules import load_rules

    rules = load_rules(options.rules, options.overrides)
    imported = import_concepts(options.concepts)
    for note in imported.notes:
        print(note, file=sys.stderr)
    examination = examine(imported.concepts, rules)
    print(text_report(examination), end="")
    if options.json is not None and not options.dry_run:
        write_json(options.json, json_report(examination))
    if options.html is not None and not options.dry_run:
        write_bytes(options.html, render_page(examination).encode())
    return BAD_DATA if examination.count("fail") else DONE
