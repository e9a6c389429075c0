"""`python -m training`: plan, run, status, export, preview. Parses arguments; heavy imports wait for the subcommand."""

import argparse
import json
import logging
import os
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from sharding.config import ConfigError, load_config
from sharding.runlog import configure_logging
from training.config import RunConfig
from training.exit_codes import BAD_DATA, BAD_USAGE, DONE, code_of, is_foreseen

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 done, 1 failed, 2 usage, 3 bad data, 75 stopped with state saved."""
    owners = sorted(set(packages_distributions().get("training", [])))
    if len(owners) > 1:
        print(f"the import name 'training' is claimed by {' and '.join(owners)}: uninstall the other", file=sys.stderr)
        return BAD_USAGE
    options = _parser().parse_args(argv)
    configure_logging(rank=int(os.environ.get("RANK", "0")), verbose=options.verbose)
    try:
        return int(options.action(options))
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

    run = _command(commands, "run", _run, "train a chunk, or several; run the same command again to resume")
    run.add_argument("--chunk", help="default: the first chunk of the run that is not done")
    run.add_argument(
        "--chunks", metavar="A:B", help="from chunk A to B, both included, in one process; names or numbers from 0"
    )
    run.add_argument("--processes", type=int, help="refuse to start unless the launcher started this many")

    plan = _command(commands, "plan", _plan, "show buckets, steps and exposures of a chunk; trains nothing")
    plan.add_argument("--chunk", help="default: the first chunk of the run that is not done")
    plan.add_argument("--processes", type=int, help="how many there will be; default: one")
    plan.add_argument("--image", type=Path, metavar="FILE", help="show source, resize, crop and bucket of a picture")
    plan.add_argument("--output", type=Path, metavar="PNG", help="with --image: draw it, too")
    plan.add_argument("--memory", action="store_true", help="what the run takes on each card, and what fits where")
    plan.add_argument("--json", action="store_true", help="the same numbers for programs")

    status = _command(commands, "status", _status, "show what is trained and what remains", needs_config=False)
    status.add_argument(
        "--verify", action="store_true", help="prove that each image was trained as often as planned; code 3 when not"
    )
    status.add_argument("--json", action="store_true", help="the same numbers for programs")

    export = _command(commands, "export", _export, "write weights from the newest state", needs_config=False)
    export.add_argument("--chunk", help="a finished chunk whose state is kept; default: the newest state")
    export.add_argument("--output", type=Path, help="folder; default: RUN/export")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: save.export_dtype")

    concepts = commands.add_parser("import-concepts", help="read a list of concepts of any trainer, even a broken one")
    concepts.add_argument("source", type=Path, help="the list, or a folder with a folder per concept")
    concepts.add_argument("--output", type=Path, metavar="TOML", help="write them as ours; default: print")
    concepts.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="where their folders lie here: 'E:\\data=/data'",
    )
    concepts.add_argument("--dry-run", action="store_true", help="read and say what is odd, write nothing")
    concepts.add_argument("-v", "--verbose", action="store_true")
    concepts.set_defaults(action=_import_concepts)

    preview = _command(
        commands, "preview", _preview, "make the run's previews from the newest state", needs_config=False
    )
    preview.add_argument("--chunk", help="a finished chunk whose state is kept; default: the newest state")
    preview.add_argument("--output", type=Path, help="folder; default: RUN/previews")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    action: object,
    summary: str,
    *,
    needs_config: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    optional = {} if needs_config else {"nargs": "?"}
    parser.add_argument("config", type=Path, metavar="RUN.toml", help="settings of the run", **optional)  # type: ignore[arg-type]
    parser.add_argument("--run-dir", type=Path, required=name != "plan", help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.set_defaults(action=action)
    return parser


def _load(options: argparse.Namespace) -> RunConfig:
    """Read the given config, or the run's own frozen one."""
    path = options.config if options.config is not None else options.run_dir / "run.toml"
    return load_config(path, RunConfig, options.overrides)


def _run(options: argparse.Namespace) -> int:
    from training.launch import launch

    return launch(
        _load(options),
        options.run_dir,
        chunk_name=options.chunk,
        chunks=options.chunks,
        num_processes=options.processes,
        dry_run=options.dry_run,
    )


def _plan(options: argparse.Namespace) -> int:
    config = _load(options)
    if options.image is not None:
        from training.placement_picture import image_text

        print(image_text(config, options.image, output=options.output))
        return DONE
    if options.memory:
        from training.memory.report import memory_report

        memory = memory_report(config, num_processes=options.processes or 1)
        print(json.dumps(memory.values(), indent=2) if options.json else memory.text())
        return DONE
    from training.inspect_run import inspect_plan

    report = inspect_plan(
        config, options.run_dir, chunk_name=options.chunk, num_processes=options.processes, with_state=True
    )
    if report is None:
        print("null" if options.json else f"all chunks of {options.run_dir} are done")
        return DONE
    print(json.dumps(report.values(), indent=2) if options.json else report.text())
    return BAD_USAGE if report.refusals else DONE


def _status(options: argparse.Namespace) -> int:
    if options.verify:
        from training.verify_run import verify_run

        proof = verify_run(_load(options), options.run_dir)
        print(json.dumps(proof.values(), indent=2) if options.json else proof.text())
        return BAD_DATA if proof.problems else DONE
    from training.status import read_status, status_json, status_text

    status = read_status(_load(options), options.run_dir)
    print(status_json(status) if options.json else status_text(status))
    return DONE


def _export(options: argparse.Namespace) -> int:
    from training.use_state import export_weights

    config = _load(options)
    output = options.output or options.run_dir / "export"
    for line in export_weights(config, options.run_dir, output, chunk_name=options.chunk, dtype_name=options.dtype):
        print(line)
    return DONE


def _import_concepts(options: argparse.Namespace) -> int:
    from sharding.files import write_bytes
    from training.dreambooth.concepts.reading import import_concepts

    mapped = [tuple(pair.partition("=")[::2]) for pair in options.map]
    imported = import_concepts(options.source, mapped=mapped)
    print(f"{options.source}: {imported.kind}, {len(imported.concepts)} concepts", file=sys.stderr)
    for note in imported.notes:
        print(f"  {note}", file=sys.stderr)
    if options.output is None:
        print(imported.toml(), end="")
    elif options.output.absolute() == options.source.absolute():
        raise ConfigError(f"{options.output}: is the list itself; give --output another name")
    elif not options.dry_run:
        write_bytes(options.output, imported.toml().encode())
        print(options.output)
    return DONE


def _preview(options: argparse.Namespace) -> int:
    from training.use_state import make_previews

    output = options.output or options.run_dir / "previews"
    for line in make_previews(_load(options), options.run_dir, output, chunk_name=options.chunk):
        print(line)
    return DONE
