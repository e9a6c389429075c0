"""What each command of `python -m sharding` takes and calls. One entry of COMMANDS and one function per command.

No logic: a command reads its config, calls one library function and says how its result is printed. Stages are
imported inside their command, so that `--help` stays quick. Parsing and exit codes are `cli`'s.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sharding.config import DatasetConfig
    from sharding.schema import Workspace

DONE, FAILED, BAD_USAGE, BAD_DATA = 0, 1, 2, 3


@dataclass(frozen=True)
class Answer:
    """What a command prints: `text`, or with --json `values`."""

    text: str
    values: Any
    exit_code: int = DONE


@dataclass(frozen=True)
class Command:
    """A command: one line of help, its own options, and what runs it."""

    help: str
    run: Callable[[argparse.Namespace], Answer]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    positionals: tuple[tuple[str, str], ...] = ()
    """(name, help) of what stands before DATASET.toml."""
    takes_config: bool = True


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _open(options: argparse.Namespace, *, must_exist: bool = True) -> tuple["DatasetConfig", "Workspace"]:
    from sharding.config import DatasetConfig, load_config
    from sharding.schema import Workspace

    config = load_config(options.config, DatasetConfig, options.overrides)
    workspace = Workspace(options.workspace if options.workspace is not None else Path("workspace") / config.name)
    if must_exist and not workspace.root.is_dir():
        raise FileNotFoundError(f"{workspace.root}: no such workspace; run `python -m sharding scan` first")
    return config, workspace


def _answer(report: Any, *, exit_code: int = DONE) -> Answer:
    """Print a report's summary; as JSON its fields, and its properties such as totals."""
    assert is_dataclass(report) and not isinstance(report, type)
    kind = type(report)
    properties = [name for name in dir(kind) if isinstance(getattr(kind, name), property)]
    values = asdict(report) | {name: getattr(report, name) for name in properties}
    return Answer(report.summary(), values, exit_code)  # type: ignore[attr-defined]


# --- options that several commands share ---


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_count, default=_num_cores(), metavar="N",
                        help="processes (default: %(default)s); 0 works in this one")  # fmt: skip


def _add_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part-index", type=int, default=0, metavar="I", help="this task's number, from 0")
    parser.add_argument("--num-parts", type=int, default=1, metavar="N", help="number of tasks")


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")


# --- scan ---


def _scan_options(parser: argparse.ArgumentParser) -> None:
    _add_workers(parser)
    _add_share(parser)
    _add_dry_run(parser)


def _scan(options: argparse.Namespace) -> Answer:
    from sharding.scan import scan

    config, workspace = _open(options, must_exist=False)
    return _answer(scan(config, workspace, workers=options.workers, part_index=options.part_index,
                        num_parts=options.num_parts, dry_run=options.dry_run))  # fmt: skip


# --- dedupe ---


def _dedupe(options: argparse.Namespace) -> Answer:
    from sharding.dedupe import dedupe

    return _answer(dedupe(*_open(options), dry_run=options.dry_run))


def _explain(options: argparse.Namespace) -> Answer:
    from sharding.duplicates.explain import explain

    found = explain(*_open(options), options.key)
    return Answer("\n".join(explanation.summary() for explanation in found), [asdict(each) for each in found])


def _apply_options(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--move", type=Path, metavar="DIR", help="move dropped files to DIR/SOURCE/PATH")
    ways.add_argument("--hardlink", action="store_true", help="make identical files hard links to their keepers")
    ways.add_argument("--trash", action="store_true", help="move dropped files to the desktop's trash")
    ways.add_argument("--undo", type=Path, metavar="JOURNAL", help="take back what a journal says")
    parser.add_argument("--reason", action="append", default=[], metavar="R", dest="reasons",
                        help="only files dropped for this reason; repeatable")  # fmt: skip
    parser.add_argument("--journal", type=Path, metavar="FILE", help="default: journals/ in the workspace")
    parser.add_argument("--yes", action="store_true", help="do it; without it nothing is touched")


def _apply(options: argparse.Namespace) -> Answer:
    import time

    from sharding.duplicates.disposal import REASONS, dispose
    from sharding.duplicates.journal import undo

    config, workspace = _open(options)
    if options.undo is not None:
        return _answer(undo(options.undo, dry_run=not options.yes))
    action: Literal["move", "hardlink", "trash"] = (
        "move" if options.move is not None else "hardlink" if options.hardlink else "trash"
    )
    name = time.strftime(f"{action}-%Y%m%d-%H%M%S.csv")
    return _answer(dispose(config, workspace, action=action, folder=options.move,
                           journal=options.journal or workspace.root / "journals" / name,
                           reasons=options.reasons or REASONS, dry_run=not options.yes))  # fmt: skip


def _contact_sheet_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--num-groups", type=_count, default=20, metavar="N", help="default: %(default)s")


def _contact_sheet(options: argparse.Namespace) -> Answer:
    from sharding.duplicates.contact_sheet import draw_contact_sheet

    return _answer(draw_contact_sheet(*_open(options), options.output, num_groups=options.num_groups))


def _add_file(help_text: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", type=Path, metavar="FILE", help=help_text)

    return add


def _export_czkawka(options: argparse.Namespace) -> Answer:
    from sharding.duplicates.czkawka import export_czkawka

    groups, files = export_czkawka(*_open(options), options.file)
    return Answer(f"{options.file}: {files:,} files in {groups:,} groups", {"groups": groups, "files": files})


# --- decisions ---


def _decide_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("keys", nargs="*", metavar="KEY")
    parser.add_argument("--where", metavar="SQL", help="every kept picture for which this is true, for example "
                        "\"score_quality < 0.2 and list_contains(tags_general, 'comic')\"")  # fmt: skip
    parser.add_argument("--who", default="", help="default: the user's name")
    parser.add_argument("--why", default="", metavar="TEXT")
    _add_dry_run(parser)


def _decide(options: argparse.Namespace) -> Answer:
    import getpass

    import pyarrow as pa

    from sharding.decisions import add_decisions, make_decisions
    from sharding.selection import select_keys

    _, workspace = _open(options)
    if bool(options.keys) == (options.where is not None):
        raise ValueError("give either keys or --where")
    keys = pa.array(options.keys, pa.string()) if options.keys else select_keys(workspace, options.where)
    rows = make_decisions(keys, decision=options.decision, who=options.who or getpass.getuser(),
                          why=options.why or options.where or "")  # fmt: skip
    return _answer(add_decisions(workspace, rows, dry_run=options.dry_run))


def _import_decisions_options(parser: argparse.ArgumentParser) -> None:
    _add_file("CSV with the columns key, decision, who, why")(parser)
    _add_dry_run(parser)


def _import_decisions(options: argparse.Namespace) -> Answer:
    from sharding.decisions import add_decisions, parse_decisions

    _, workspace = _open(options)
    rows = parse_decisions(options.file.read_text(encoding="utf-8"), name=str(options.file))
    return _answer(add_decisions(workspace, rows, dry_run=options.dry_run))


def _export_decisions(options: argparse.Namespace) -> Answer:
    from sharding.decisions import export_decisions

    _, workspace = _open(options)
    count = export_decisions(workspace, options.file)
    return Answer(f"{options.file}: {count:,} decisions", {"decisions": count})


# --- plan, pack, combine, verify ---


def _plan(options: argparse.Namespace) -> Answer:
    from sharding.plan import make_plan

    return _answer(make_plan(*_open(options), dry_run=options.dry_run))


def _pack_options(parser: argparse.ArgumentParser) -> None:
    _add_workers(parser)
    _add_share(parser)
    _add_dry_run(parser)
    parser.add_argument("--captions-only", action="store_true", help="new indexes only, no tar is touched")
    parser.add_argument("--rewrite-shards", action="store_true", help="bring the captions in tars up to date")


def _pack(options: argparse.Namespace) -> Answer:
    from sharding.pack import pack

    config, workspace = _open(options)
    return _answer(pack(config, workspace, workers=options.workers, part_index=options.part_index,
                        num_parts=options.num_parts, captions_only=options.captions_only,
                        rewrite_shards=options.rewrite_shards, dry_run=options.dry_run))  # fmt: skip


def _combine_options(parser: argparse.ArgumentParser) -> None:
    _add_dry_run(parser)
    parser.add_argument("--materialize", action="store_true", help="write real tars instead of pointers")


def _combine(options: argparse.Namespace) -> Answer:
    from sharding.combine import combine

    return _answer(combine(*_open(options), materialize=options.materialize, dry_run=options.dry_run))


def _verify_options(parser: argparse.ArgumentParser) -> None:
    _add_workers(parser)
    parser.add_argument("--chunk", metavar="C", help="only this one, e.g. newest/0004")
    parser.add_argument("--repair", action="store_true", help="make damaged files again from the sources")


def _verify(options: argparse.Namespace) -> Answer:
    from sharding.verify import verify

    config, workspace = _open(options)
    problems = verify(workspace, chunk=options.chunk, workers=options.workers)
    if options.repair and problems:
        from sharding.repair import repair

        report = repair(config, workspace, problems, workers=options.workers)
        return _answer(report, exit_code=BAD_DATA if report.left else DONE)
    return Answer(
        "\n".join(str(problem) for problem in problems) or "no problems",
        {"problems": [asdict(problem) for problem in problems]},
        BAD_DATA if problems else DONE,
    )


# --- report and show ---


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write one self-contained page")
    parser.add_argument("--samples", type=_count, default=6, metavar="N",
                        help="pictures of each dataset on the page (default: %(default)s; 0: none)")  # fmt: skip
    parser.add_argument("--seed", type=_count, default=0, metavar="S", help="of the choice of pictures and groups")


def _report(options: argparse.Namespace) -> Answer:
    from sharding.report import make_report

    config, workspace = _open(options)
    report = make_report(config, workspace, seed=options.seed)
    if options.html is not None:
        from sharding.reporting.html import write_page

        write_page(config, workspace, report, options.html, num_samples=options.samples, seed=options.seed)
    return _answer(report, exit_code=DONE if report.adds_up else BAD_DATA)


def _card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: README.md in the workspace")
    parser.add_argument("--license", default="unknown", metavar="ID", help="a name of the hub (default: %(default)s)")
    parser.add_argument("--license-name", default="", metavar="NAME", help="with --license other")
    parser.add_argument("--license-link", default="", metavar="URL", help="with --license other")
    parser.add_argument("--homepage", default="", metavar="URL")


def _card(options: argparse.Namespace) -> Answer:
    from sharding.card import CardFacts, write_card
    from sharding.report import make_report

    facts = CardFacts(options.license, options.license_name, options.license_link, options.homepage)
    config, workspace = _open(options)
    path = options.output if options.output is not None else workspace.root / "README.md"
    return _answer(write_card(make_report(config, workspace), path, facts))


def _show(options: argparse.Namespace) -> Answer:
    from sharding.show import render_keys, show

    found = show(*_open(options), options.key)
    return Answer(render_keys(found), [asdict(facts) | {"fate": facts.fate} for facts in found])


# --- kohya ---


def _export_kohya_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that receives a folder per chunk")
    parser.add_argument("--chunk", action="append", default=[], metavar="C", dest="chunks",
                        help="only this one, e.g. newest/0004; repeatable")  # fmt: skip
    parser.add_argument("--text-as", choices=("tags", "caption"), default="tags",
                        help="its key in the in_json (default: %(default)s; for wildcards: caption)")  # fmt: skip
    parser.add_argument("--link", choices=("copy", "hardlink"), default="copy",
                        help="hardlink: to source files that were packed unchanged (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seen-at", type=Path, metavar="DIR", help="OUT's path where kohya will run")
    _add_dry_run(parser)


def _export_kohya(options: argparse.Namespace) -> Answer:
    from sharding.kohya.exporting import export_kohya

    config, workspace = _open(options)
    return _answer(export_kohya(config, workspace, options.out, chunks=options.chunks, text_key=options.text_as,
                                link=options.link, seen_at=options.seen_at, dry_run=options.dry_run))  # fmt: skip


def _import_kohya_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DATASET.toml", help="the config to write")
    parser.add_argument("--metadata", type=Path, metavar="FILE", help="the folder's in_json")
    parser.add_argument("--dataset-config", type=Path, metavar="FILE", help="kohya's, TOML or JSON")
    parser.add_argument("--name", default="kohya", help="of the dataset (default: %(default)s)")


def _import_kohya(options: argparse.Namespace) -> Answer:
    from sharding.kohya.importing import import_kohya

    return _answer(import_kohya(Path(options.folder), output=options.output, metadata=options.metadata,
                                dataset_config=options.dataset_config, name=options.name))  # fmt: skip


COMMANDS = {
    "scan": Command("one row per file: key, size, date, tags, perceptual hash", _scan, _scan_options),
    "dedupe": Command("groups of near-duplicates, which one stays and why", _dedupe, _add_dry_run),
    "dedupe explain": Command(
        "why a picture stayed or went",
        _explain,
        positionals=(("key", "a key, its first digits, or the path of a file"),),
    ),
    "dedupe apply": Command("move, link or trash the source files that dedupe dropped", _apply, _apply_options),
    "dedupe contact-sheet": Command(
        "draw groups, nearest to the threshold first", _contact_sheet, _contact_sheet_options
    ),
    "export-czkawka": Command(
        "duplicate groups in the form of czkawka's results", _export_czkawka, _add_file("OUT.json or OUT.csv")
    ),
    "decide": Command(
        "say keep, drop, not_a_duplicate, preferred_keeper or forget of pictures",
        _decide,
        _decide_options,
        positionals=(("decision", "one of these words"),),
    ),
    "decisions import": Command("add decisions from a CSV", _import_decisions, _import_decisions_options),
    "decisions export": Command("write all decisions as CSV", _export_decisions, _add_file("the CSV to write")),
    "plan": Command("which sample goes into which chunk", _plan, _add_dry_run),
    "pack": Command("write planned chunks as webdataset shards", _pack, _pack_options),
    "combine": Command("mix chunk k of every dataset into combined chunks", _combine, _combine_options),
    "verify": Command("reopen chunks, recompute, compare", _verify, _verify_options),
    "report": Command("account for every file; --html writes a page", _report, _report_options),
    "card": Command("write a Hugging Face dataset card", _card, _card_options),
    "export-kohya": Command("chunks as folders and in_json for kohya", _export_kohya, _export_kohya_options),
    "import-kohya": Command(
        "write a dataset.toml for a kohya folder",
        _import_kohya,
        _import_kohya_options,
        positionals=(("folder", "pictures, or folders REPEATS_class tokens"),),
        takes_config=False,
    ),
    "show": Command(
        "everything known about a picture",
        _show,
        positionals=(("key", "a key, its first digits, or the path of a file"),),
    ),
}
"""By what the user types: one word, or two (`dedupe explain`)."""
