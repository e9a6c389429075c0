"""`python -m captioning COMMAND DATASET.toml`: arguments in, report and exit code out.

Exit codes: 0 done, 1 failed or stopped by Ctrl-C or SIGTERM, 2 bad usage or config, 3 bad data. No work is done here.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from captioning.config import CaptioningConfig
    from sharding.schema import Workspace

logger = logging.getLogger(__name__)

DONE, FAILED, BAD_USAGE, BAD_DATA = 0, 1, 2, 3


class Report(Protocol):
    """What every stage returns."""

    def summary(self) -> str: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    owners = sorted(set(packages_distributions().get("captioning", [])))
    if len(owners) > 1:
        others = ", ".join(name for name in owners if name != "chunkline")
        print(f"error: {others} also installs a package named captioning: `pip uninstall {others}`", file=sys.stderr)
        return BAD_USAGE
    options = _parser().parse_args(arguments)

    from captioning.compose import AnnotationMissingError
    from captioning.config import CaptioningConfig
    from captioning.decode import WorkerDiedError
    from captioning.edit_table import EditError
    from captioning.plugin import ModelError
    from sharding.config import ConfigError, load_config
    from sharding.files import unsupported_system
    from sharding.images import BrokenFractionError
    from sharding.runlog import configure_logging
    from sharding.schema import Workspace
    from sharding.tables import DamagedPartError

    if problem := unsupported_system():
        return _fail(problem, BAD_USAGE)
    configure_logging(verbose=options.verbose)
    try:
        config = load_config(options.dataset, CaptioningConfig, options.set)
        _check_part(options)
    except (FileNotFoundError, ValueError) as error:
        return _fail(error, BAD_USAGE)
    workspace = Workspace(options.workspace or Path("workspace") / config.name)
    try:
        with _sigterm_as_ctrl_c():
            report = _run(options, config, workspace)
    except (ConfigError, ModelError, EditError, FileNotFoundError) as error:
        return _fail(error, BAD_USAGE)
    except (DamagedPartError, AnnotationMissingError, BrokenFractionError) as error:
        return _fail(error, BAD_DATA)
    except (OSError, WorkerDiedError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("stopped; finished parts stay, run the same command again", FAILED)
    except Exception:
        logger.exception("%s failed", options.command)
        return FAILED
    try:
        print(report.summary(), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, by which Slurm asks a job to end, clean up and say what to do, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace") -> Report:
    if options.command == "annotate":
        from captioning.annotate import annotate

        models = [name.strip() for name in options.models.split(",")] if options.models else None
        return annotate(
            config,
            workspace,
            models=models,
            workers=options.workers,
            devices=options.devices,
            chunks=[name.strip() for name in options.chunks.split(",")] if options.chunks else None,
            part_index=options.part_index,
            num_parts=options.num_parts,
            retry=options.retry,
            dry_run=options.dry_run,
        )
    policy = options.policy or config.pack.policy
    if options.command == "compose":
        from captioning.compose_commands import run_compose

        return run_compose(options, config, workspace, policy=policy)
    if options.command == "traits":
        from captioning.compose_commands import run_traits

        return run_traits(options, config, workspace, policy=policy)
    if options.command == "edit":
        from captioning.edit_commands import run_edit

        return run_edit(options, config, workspace, policy=policy)
    from captioning.stats_commands import run_stats

    return run_stats(options, config, workspace, policy=policy)


def _parser() -> argparse.ArgumentParser:
    from captioning.compose_commands import add_compose_options, add_traits_options
    from captioning.edit_commands import add_edit_options
    from captioning.stats_commands import add_stats_options

    parser = argparse.ArgumentParser(prog="python -m captioning", description="Tag, score and caption kept images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    annotate = commands.add_parser("annotate", help="run taggers and scorers, one decode per image for all of them")
    compose = commands.add_parser("compose", help="make captions of annotations and records, by a policy")
    traits = commands.add_parser("traits", help="measure what the names of characters shall carry")
    stats = commands.add_parser("stats", help="count words, pairs, lengths and scores; --what-if tries other edges")
    edit = commands.add_parser("edit", help="change captions by hand, many at once; undo")
    for command in (annotate, compose, traits, stats, edit):
        command.add_argument("dataset", type=Path, metavar="DATASET.toml")
        _add_shared(command)
    for command in (annotate, compose):
        command.add_argument("--part-index", type=int, default=0, help="which task this is, from 0")
        command.add_argument("--num-parts", type=int, default=1, help="how many tasks share the work")
        command.add_argument("--dry-run", action="store_true", help="say what would be done")
    for command in (compose, traits, stats, edit):
        _add_policy(command)
    annotate.add_argument("--models", metavar="A,B", help="names in annotate.models (default: all)")
    annotate.add_argument(
        "--devices", metavar="CUDA:0,CUDA:1", help="share the parts among devices (default: annotate.device)"
    )
    annotate.add_argument(
        "--chunks", metavar="A/0000,B/0001", help="read images from these packed chunks where they have them, or all"
    )
    annotate.add_argument("--retry", action="store_true", help="look again at files that could not be read")
    annotate.add_argument("--workers", type=int, help="decode processes in all; 0: a thread (default: the config's)")
    add_compose_options(compose)
    add_traits_options(traits)
    add_stats_options(stats)
    for operation in add_edit_options(edit):
        _add_shared(operation, default=argparse.SUPPRESS)
        _add_policy(operation, default=argparse.SUPPRESS)
    return parser


def _add_shared(command: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add what all commands have. default: SUPPRESS keeps what stands before the name of an operation."""
    command.add_argument(
        "--workspace", type=Path, default=default, help="folder of the tables (default: workspace/NAME)"
    )
    command.add_argument(
        "--set", action="append", default=default or [], metavar="KEY=VALUE", help="override a config value; repeatable"
    )
    command.add_argument("-v", "--verbose", action="store_true", default=default or False, help="log more")


def _add_policy(command: argparse.ArgumentParser, *, default: str | None = None) -> None:
    command.add_argument("--policy", default=default, help="name of the policy (default: pack.policy)")


def _check_part(options: argparse.Namespace) -> None:
    from sharding.tables import owned_parts

    if options.command in ("annotate", "compose"):
        owned_parts([], options.part_index, options.num_parts)
    if options.command == "annotate" and options.devices:
        from captioning.devices import parse_devices

        options.devices = parse_devices(options.devices)


def _fail(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
