"""The whole data side in order: scan, dedupe, annotate, compose, plan, pack, combine, verify, report.

    python -m scripts.build_chunks configs/datasets/demo.toml --workspace demo/workspace

Every stage does only what is missing, so running it again after a kill, or after adding pictures, goes on.
"""

import argparse
import sys
from pathlib import Path

from scripts.commands import PYTHON, run_all

STAGES = (
    ("sharding", "scan"),
    ("sharding", "dedupe"),
    ("captioning", "annotate"),
    ("captioning", "compose"),
    ("sharding", "plan"),
    ("sharding", "pack"),
    ("sharding", "combine"),
    ("sharding", "verify"),
    ("sharding", "report"),
)
WITH_WORKERS = {"scan", "annotate", "pack"}


def stage_commands(
    dataset: Path, *, workspace: Path | None, workers: int | None, overrides: list[str], dry_run: bool
) -> list[list[str]]:
    """Return the command line of every stage."""
    commands = []
    for package, stage in STAGES:
        command = [*PYTHON, package, stage, str(dataset)]
        command += ["--workspace", str(workspace)] if workspace is not None else []
        command += ["--workers", str(workers)] if workers is not None and stage in WITH_WORKERS else []
        command += [word for override in overrides for word in ("--set", override)]
        command += ["--dry-run"] if dry_run and stage not in ("verify", "report") else []
        commands.append(command)
    return commands


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.build_chunks", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, metavar="DATASET.toml")
    parser.add_argument("--workspace", type=Path, help="default: workspace/<name of the dataset>")
    parser.add_argument("--workers", type=int, help="processes of scan, annotate and pack")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="say what each stage would do")
    options = parser.parse_args(argv)
    return run_all(
        stage_commands(
            options.dataset,
            workspace=options.workspace,
            workers=options.workers,
            overrides=options.overrides,
            dry_run=options.dry_run,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
