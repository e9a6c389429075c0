"""The whole data side as a chain of Slurm jobs: scan, dedupe, annotate, compose, plan, pack, combine, verify, report.

    python -m scripts.submit_build configs/datasets/demo.toml --workspace demo/workspace --num-parts 4

scan, annotate and pack are array jobs of --num-parts tasks, the other stages one job each; every job waits until the
one before it has ended well, and is cancelled by Slurm when it cannot. Running it again submits what is missing and
nothing that is in the queue; in the jobs, each stage skips what is current. No logic of a stage is here: a job is one
of slurm/*.sbatch and one command.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.build_chunks import STAGES
from scripts.slurm_queue import ROOT, Queued, SlurmError, job_name, read_queue, run_slurm

ARRAYS = ("scan", "annotate", "pack")
PACKAGES = {"list": "sharding"} | {stage: package for package, stage in STAGES}
CHAIN = ("list", *(stage for _, stage in STAGES))
"""What is submitted, in order. `list` is a scan that lists new files and makes the first part, no more: the tasks of
the array would otherwise start on different listings."""
_BEYOND_ALL_PARTS = 1_000_000
DONE, FAILED, BAD_USAGE = 0, 1, 2


@dataclass(frozen=True)
class Job:
    """One stage of the chain. state: queued (was there before), submitted, or in a dry run to_submit."""

    stage: str
    state: str
    job_id: str
    """All its ids, joined by ","; a name in <> where a dry run has none."""
    waits_for: tuple[str, ...]
    """Ids of jobs or array tasks that must end well first."""
    command: tuple[str, ...]
    """The sbatch command; empty when nothing is submitted."""


def submit(
    dataset: Path,
    workspace: Path,
    *,
    num_parts: int,
    stages: Sequence[str],
    queue: Mapping[str, Queued],
    overrides: Sequence[str] = (),
    sbatch_options: Mapping[str, Sequence[str]],
    dry_run: bool,
) -> list[Job]:
    """Submit those of `stages` that the queue does not hold, each waiting for the one before it; return the chain.

    sbatch_options: further words for sbatch by stage. When a later stage is in the queue already, the stages before the
    first one there have run for it and are not submitted. Raises SlurmError, naming the jobs submitted before.
    """
    jobs: list[Job] = []
    waits_for: tuple[str, ...] = ()
    first_queued = min((CHAIN.index(stage) for stage in queue), default=0)
    for stage in CHAIN[first_queued:]:
        queued = queue.get(stage)
        is_waited_for = any(later in queue for later in CHAIN[CHAIN.index(stage) + 1 :])
        missing = [] if queued is not None and is_waited_for else _missing_tasks(stage, num_parts, queued)
        if stage not in stages or not missing:
            if queued is not None:
                waits_for = _to_wait_for(queued, num_parts)
                jobs.append(Job(stage, "queued", ",".join(queued.job_ids), (), ()))
            continue
        command = (
            *_sbatch_words(workspace, stage, num_parts, missing, waits_for, sbatch_options.get(stage, ())),
            *_stage_words(dataset, workspace, stage, num_parts, overrides),
        )
        job_id = f"<{stage}>" if dry_run else _submit(command, jobs)
        jobs.append(Job(stage, "to_submit" if dry_run else "submitted", job_id, waits_for, command))
        waits_for = (*(_to_wait_for(queued, num_parts) if queued is not None else ()), job_id)
    return jobs


def _missing_tasks(stage: str, num_parts: int, queued: Queued | None) -> list[int]:
    """Return the tasks to submit; [0] stands for a job that is no array.

    Tasks of an array that have ended may have failed: they are submitted again, and end at once if all is current.
    (Not while a later stage waits for the array: when that has ended, Slurm runs the later stage or cancels it.)
    """
    if stage not in ARRAYS:
        return [0] if queued is None else []
    return [task for task in range(num_parts) if queued is None or task not in queued.tasks]


def _to_wait_for(queued: Queued, num_parts: int) -> tuple[str, ...]:
    """Return ids for a dependency. A task that has ended may have failed: then only the others are waited for."""
    if queued.tasks and (len(queued.tasks) < num_parts or len(queued.job_ids) > 1):
        return tuple(queued.tasks.values())
    return queued.job_ids


def _sbatch_words(
    workspace: Path, stage: str, num_parts: int, tasks: Sequence[int], waits_for: Sequence[str], more: Sequence[str]
) -> list[str]:
    is_array = stage in ARRAYS
    words = ["sbatch", "--parsable", f"--job-name={job_name(workspace, stage, num_parts)}"]
    if is_array:
        is_all = list(tasks) == list(range(num_parts))
        words.append(f"--array={f'0-{num_parts - 1}' if is_all else ','.join(map(str, tasks))}")
    if waits_for:
        words += [f"--dependency=afterok:{':'.join(waits_for)}", "--kill-on-invalid-dep=yes"]
    words.append(f"--output={workspace.resolve() / 'logs' / (stage + ('-%A_%a' if is_array else '-%j'))}.log")
    return [*words, *more, f"slurm/{stage}_array.sbatch" if is_array else "slurm/stage.sbatch"]


def _stage_words(dataset: Path, workspace: Path, stage: str, num_parts: int, overrides: Sequence[str]) -> list[str]:
    words = [str(dataset), "--workspace", str(workspace)]
    words += [word for override in overrides for word in ("--set", override)]
    if stage in ARRAYS:
        return [*words, "--num-parts", str(num_parts)]
    if stage == "list":
        return ["sharding", "scan", *words, "--num-parts", str(_BEYOND_ALL_PARTS)]
    return [PACKAGES[stage], stage, *words]


def _submit(command: Sequence[str], before: Sequence[Job]) -> str:
    try:
        return run_slurm(command).strip().partition(";")[0]
    except SlurmError as error:
        done = ", ".join(f"{job.stage} {job.job_id}" for job in before if job.state == "submitted")
        raise SlurmError(
            f"{error}" + (f"\nsubmitted before: {done}; the same command again goes on from there" if done else "")
        ) from None


# --- command line ---


def _stages(first: str, last: str, num_parts: int) -> list[str]:
    """Return the stages from `first` to `last`; a scan of several tasks has its listing made first."""
    names = [stage for _, stage in STAGES]
    if names.index(first) > names.index(last):
        raise ValueError(f"--from {first} comes after --until {last}; the order is {', '.join(names)}")
    chosen = names[names.index(first) : names.index(last) + 1]
    return ["list", *chosen] if "scan" in chosen and num_parts > 1 else chosen


def _sbatch_options(given: Sequence[str], partition: str | None) -> dict[str, list[str]]:
    """Return further words for sbatch by stage: `annotate=--gpus-per-task=1` is for one, `--mem=8G` for all."""
    options: dict[str, list[str]] = {stage: [] for stage in CHAIN}
    if partition is not None:
        given = [f"--partition={partition}", *given]
    for text in given:
        stage, equals, words = text.partition("=")
        if not text.startswith("-") and (not equals or stage not in options):
            raise ValueError(f"--sbatch {text!r}: expected OPTIONS or STAGE=OPTIONS; stages are {', '.join(CHAIN)}")
        for name in CHAIN if text.startswith("-") else [stage]:
            options[name] += shlex.split(text if text.startswith("-") else words)
    return options


def _text(jobs: Sequence[Job], workspace: Path) -> str:
    lines = []
    for job in jobs:
        after = f"  after {', '.join(job.waits_for)}" if job.waits_for else ""
        lines.append(f"{job.stage:9} {job.state.replace('_', ' '):10} {job.job_id}{after}")
        if job.state == "to_submit":
            lines.append(f"    $ {shlex.join(job.command)}")
    num_submitted = sum(job.state == "submitted" for job in jobs)
    if any(job.state == "to_submit" for job in jobs):
        lines.append("nothing was submitted (--dry-run)")
    elif num_submitted:
        lines.append(f"{num_submitted} submitted; logs will be in {workspace / 'logs'}, progress: squeue --me")
    else:
        lines.append("nothing to submit: the queue holds what is to do")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    names = [stage for _, stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m scripts.submit_build", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, metavar="DATASET.toml")
    parser.add_argument("--workspace", type=Path, help="default: workspace/<name of the dataset>")
    parser.add_argument("--num-parts", type=int, default=8, metavar="N",
                        help="tasks of scan, annotate and pack (default: %(default)s)")  # fmt: skip
    parser.add_argument("--from", choices=names, default=names[0], dest="first", metavar="STAGE", help="first stage")
    parser.add_argument("--until", choices=names, default=names[-1], dest="last", metavar="STAGE", help="last stage")
    parser.add_argument("--partition", help="partition of all jobs; SBATCH_PARTITION in slurm/env.sh does the same")
    parser.add_argument("--sbatch", action="append", default=[], metavar="[STAGE=]OPTIONS",
                        help="further options of sbatch, e.g. --sbatch=--mem=8G or "
                        "--sbatch='annotate=--gpus-per-task=1 --time=2:00:00'; repeatable")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch commands, submit nothing")
    parser.add_argument("--json", action="store_true", help="print the chain as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit the chain and return the exit code."""
    options = _parser().parse_args(arguments)
    from captioning.config import CaptioningConfig
    from sharding.config import load_config

    try:
        config = load_config(options.dataset, CaptioningConfig, options.overrides)
        if options.num_parts < 1:
            raise ValueError(f"--num-parts must be at least 1, got {options.num_parts}")
        if Path.cwd() != ROOT:
            raise ValueError(f"paths in configs start at the checkout: run this in {ROOT}, not in {Path.cwd()}")
        workspace = options.workspace or Path("workspace") / config.name
        stages = _stages(options.first, options.last, options.num_parts)
        sbatch_options = _sbatch_options(options.sbatch, options.partition)
        is_printed_only = options.dry_run and shutil.which("squeue") is None
        queue = {} if is_printed_only else read_queue(workspace, options.num_parts)
        if not options.dry_run:
            (workspace / "logs").mkdir(parents=True, exist_ok=True)  # Slurm starts no job whose log has no folder
        jobs = submit(
            options.dataset, workspace, num_parts=options.num_parts, stages=stages,
            queue=queue, overrides=options.overrides,
            sbatch_options=sbatch_options, dry_run=options.dry_run,
        )  # fmt: skip
    except (ValueError, OSError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, SlurmError) else BAD_USAGE
    print(json.dumps([asdict(job) for job in jobs], indent=2) if options.json else _text(jobs, workspace))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
