"""`training doctor`: a concepts list's pictures and captions against the wiki's rules, and repaired copies of them."""

import argparse
import sys
from pathlib import Path

from sharding.config import ConfigError
from sharding.files import write_bytes, write_json
from training.exit_codes import BAD_DATA, DONE

SUMMARY = "measure a DreamBooth data set against the wiki's rules, and repair copies; exit code 3 when a rule fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("concepts", type=Path, help="a list of concepts of any trainer, or a folder with them")
    parser.add_argument("--rules", type=Path, metavar="TOML", help="limits that differ from the builtin ones")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="of the rules"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and findings")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures")
    parser.add_argument(
        "--detector", metavar="FILE", help="says who is in a picture: FILE.onnx, or FILE.py:FUNCTION (runs your code)"
    )
    fix = parser.add_argument_group("repaired copies", "originals are never touched; settings: fix.* of the rules")
    fix.add_argument("--fix", type=Path, metavar="DIR", help="write copies, their captions and concepts.toml")
    fix.add_argument("--levels", choices=("no", "beside", "replace"), help="auto level and contrast (fix.levels)")
    fix.add_argument("--stitch", action="store_true", help="make frames of one pan one picture (fix.stitch)")
    fix.add_argument("--upscaler", type=Path, metavar="ONNX", help="a network that enlarges, as R-ESRGAN 4x+ Anime6B")
    fix.add_argument("--upscale", metavar="1..2", help="times it enlarges in the end; 1 only cleans (fix.upscale)")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.dreambooth.concepts.reading import import_concepts
    from training.dreambooth.doctor.detector import load_detector
    from training.dreambooth.doctor.examination import examine
    from training.dreambooth.doctor.page import render_page
    from training.dreambooth.doctor.report import json_report, text_report
    from training.dreambooth.doctor.rules import load_rules

    rules = load_rules(options.rules, [*options.overrides, *_fix_overrides(options)])
    if rules.fix.upscale != 1 and options.upscaler is None:
        raise ConfigError(
            f"fix.upscale = {rules.fix.upscale:g} needs a network; give --fix DIR --upscaler FILE.onnx, too"
        )
    imported = import_concepts(options.concepts)
    for note in imported.notes:
        print(note, file=sys.stderr)
    detector = None if options.detector is None else load_detector(options.detector, rules.detector)
    examination = examine(imported.concepts, rules, detector=detector)
    print(text_report(examination), end="")
    if options.json is not None and not options.dry_run:
        write_json(options.json, json_report(examination))
    if options.html is not None and not options.dry_run:
        write_bytes(options.html, render_page(examination).encode())
    if options.fix is not None and not options.dry_run:
        from training.dreambooth.doctor.fix.copies import write_copies
        from training.dreambooth.doctor.fix.upscale import Upscaler

        upscaler = None if options.upscaler is None else Upscaler(options.upscaler)
        print(write_copies(examination, options.fix, upscaler=upscaler).text(), end="")
    return BAD_DATA if examination.count("fail") else DONE


def _fix_overrides(options: argparse.Namespace) -> list[str]:
    """Return the options of --fix as settings of the rules. Raises ConfigError for those that nothing would read."""
    given = {"levels": options.levels, "stitch": options.stitch or None, "upscale": options.upscale}
    overrides = [f"fix.{key}={str(value).lower()}" for key, value in given.items() if value is not None]
    if options.fix is None and (overrides or options.upscaler is not None):
        raise ConfigError("--levels, --stitch, --upscaler and --upscale are of copies; give --fix DIR, too")
    return overrides
