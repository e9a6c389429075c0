"""The commands of the data side: `python -m sharding COMMAND DATASET.toml [--workspace W] …`.

Parses, calls one library function, prints its result and turns errors into exit codes:
0 done, 1 failed, 2 bad usage or config, 3 bad data. No logic of its own.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.config import DatasetConfig
    from sharding.schema import Workspace

logger = logging.getLogger(__name__)

DONE, FAILED, BAD_USAGE, BAD_DATA = 0, 1, 2, 3

_COMMANDS = {
    "scan": "one row per file: key, size, date, tags, perceptual hash",
    "dedupe": "groups of near-duplicates, which one stays and why",
    "plan": "which sample goes into which chunk",
    "pack": "write planned chunks as webdataset shards",
    "combine": "mix chunk k of every dataset into combined chunks",
    "verify": "reopen chunks, recompute, compare",
    "report": "account for every file",
    "show": "everything known about a key",
}


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
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help or the mistake
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    from sharding.runlog import configure_logging

    configure_logging(verbose=options.verbose)
    try:
        return _run(options)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, OSError) as error:
        return _exit_code(error)
    except Exception:
        logger.exception("%s failed", options.command)
        return FAILED


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
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name == "show":
            command.add_argument("key", metavar="KEY", help="a key or its first digits")
        command.add_argument("config", type=Path, metavar="DATASET.toml")
        command.add_argument("--workspace", type=Path, metavar="W", help="default: workspace/<name of the dataset>")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                             help="override a setting, e.g. plan.chunk_size=4000; repeatable")  # fmt: skip
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("-v", "--verbose", action="store_true", help="log more")
        if name in ("scan", "pack", "verify"):
            command.add_argument("--workers", type=_count, default=_num_cores(), metavar="N",
                                 help="processes (default: %(default)s); 0 works in this one")  # fmt: skip
        if name in ("scan", "pack"):
            command.add_argument("--part-index", type=int, default=0, metavar="I", help="this task's number, from 0")
            command.add_argument("--num-parts", type=int, default=1, metavar="N", help="number of tasks")
        if name in ("scan", "dedupe", "plan", "pack", "combine"):
            command.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
        if name == "pack":
            command.add_argument("--captions-only", action="store_true", help="new indexes only, no tar is touched")
            command.add_argument("--rewrite-shards", action="store_true", help="bring the captions in tars up to date")
        if name == "combine":
            command.add_argument("--materialize", action="store_true", help="write real tars instead of pointers")
        if name == "verify":
            command.add_argument("--chunk", metavar="C", help="only this one, e.g. newest/0004")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(options: argparse.Namespace) -> int:
    from sharding.config import DatasetConfig, load_config
    from sharding.schema import Workspace

    config = load_config(options.config, DatasetConfig, options.overrides)
    workspace = Workspace(options.workspace if options.workspace is not None else Path("workspace") / config.name)
    if options.command != "scan" and not workspace.root.is_dir():
        raise FileNotFoundError(f"{workspace.root}: no such workspace; run `python -m sharding scan` first")
    if options.command == "verify":
        return _verify(workspace, options)
    if options.command == "show":
        from sharding.show import render_keys, show

        found = show(workspace, options.key)
        print(_json([asdict(facts) | {"fate": facts.fate} for facts in found]) if options.json else render_keys(found))
        return DONE
    report = _stage(config, workspace, options)
    print(_json(_values(report)) if options.json else report.summary())
    if options.command == "report" and not report.adds_up:
        return BAD_DATA
    return DONE


def _stage(config: "DatasetConfig", workspace: "Workspace", options: argparse.Namespace) -> Any:
    if options.command == "scan":
        from sharding.scan import scan

        return scan(config, workspace, workers=options.workers, part_index=options.part_index,
                    num_parts=options.num_parts, dry_run=options.dry_run)  # fmt: skip
    if options.command == "dedupe":
        from sharding.dedupe import dedupe

        return dedupe(config, workspace, dry_run=options.dry_run)
    if options.command == "plan":
        from sharding.plan import make_plan

        return make_plan(config, workspace, dry_run=options.dry_run)
    if options.command == "pack":
        from sharding.pack import pack

        return pack(config, workspace, workers=options.workers, part_index=options.part_index,
                    num_parts=options.num_parts, captions_only=options.captions_only,
                    rewrite_shards=options.rewrite_shards, dry_run=options.dry_run)  # fmt: skip
    if options.command == "combine":
        from sharding.combine import combine

        return combine(config, workspace, materialize=options.materialize, dry_run=options.dry_run)
    from sharding.report import make_report

    return make_report(config, workspace)


def _verify(workspace: "Workspace", options: argparse.Namespace) -> int:
    from sharding.verify import verify

    problems = verify(workspace, chunk=options.chunk, workers=options.workers)
    if options.json:
        print(_json({"problems": [asdict(problem) for problem in problems]}))
    else:
        print("\n".join(str(problem) for problem in problems) or "no problems")
    return BAD_DATA if problems else DONE


def _values(report: Any) -> dict[str, Any]:
    """Return a report's fields, and its properties such as totals."""
    assert is_dataclass(report) and not isinstance(report, type)
    kind = type(report)
    properties = [name for name in dir(kind) if isinstance(getattr(kind, name), property)]
    return asdict(report) | {name: getattr(report, name) for name in properties}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
