"""Submit the chunks of a run as Slurm jobs, one job per chunk, each waiting until the one before has ended well.

    python -m scripts.submit_chunks RUN.toml --run-dir R --dry-run
    python -m scripts.submit_chunks RUN.toml --run-dir R --max-queued 50 -- --gpus-per-node=8 --time=4:00:00

Asks the run's ledger what is done and the queue what is on its way, and submits the rest: typed a second time, it
submits nothing. It cancels nothing. A job is slurm/train_chunk.sbatch and one chunk; how a job ends is decided in it
(`end_chunk_job`). With --array it is one array of which one task runs at a time, each training what is next by then.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.slurm_queue import ROOT, QueuedJob, SlurmError, jobs_of, run_slurm
from sharding.chunk import ChunkError
from sharding.config import load_config
from sharding.files import locked
from training.campaign import in_turn, read_campaign, require_in_campaign
from training.config import RunConfig
from training.exit_codes import BAD_USAGE, DONE, FAILED, code_of
from training.run_dir import RunDir
from training.stages import epochs_of
from training.status_queue import folder_digest

NEXT = "next"
"""The name of an array's tasks: each trains the chunk that is next when it starts."""
_SHOWN_IN_A_ROW = 6


@dataclass(frozen=True)
class ChunkJob:
    """A chunk and its job. state: done, submitted, to_submit (dry run), not_submitted, or as in `QueuedJob`."""

    chunk: str
    state: str
    job_id: str = ""
    waits_for: str = ""
    command: tuple[str, ...] = ()
    """The sbatch command; empty where nothing is submitted."""


@dataclass(frozen=True)
class Submission:
    """What to start a job with. sbatch_options: further words for sbatch."""

    config: Path
    run_dir: Path
    overrides: tuple[str, ...] = ()
    sbatch_options: tuple[str, ...] = ()

    def command(self, name: str, *, chunk: str | None, waits_for: str = "", array: str = "") -> tuple[str, ...]:
        """Return the sbatch command of a job; chunk None: the one that is next when it starts."""
        log = f"{name.replace('/', '-')}-{'%A_%a' if array else '%j'}.log"
        words = ["sbatch", "--parsable", f"--job-name={name}.{folder_digest(self.run_dir)}"]
        words += [f"--array={array}"] if array else []
        words += [f"--dependency=afterok:{waits_for}", "--kill-on-invalid-dep=yes"] if waits_for else []
        words += [f"--output={logs_folder(self.run_dir) / log}", *self.sbatch_options, "slurm/train_chunk.sbatch"]
        words += [str(self.config), str(self.run_dir), *(("--chunk", chunk) if chunk is not None else ())]
        return (*words, *(word for override in self.overrides for word in ("--set", override)))

    def send(self, command: Sequence[str]) -> str:
        """Run an sbatch command; return the job's id."""
        logs_folder(self.run_dir).mkdir(parents=True, exist_ok=True)  # Slurm starts no job whose log has no folder
        return run_slurm(command).strip().partition(";")[0]


def logs_folder(run_dir: Path) -> Path:
    """Return where the logs of a run's jobs are."""
    return run_dir.resolve() / "logs"


def submit_chunk(
    config: Path,
    run_dir: Path,
    chunk: str,
    *,
    overrides: Sequence[str] = (),
    sbatch_options: Sequence[str] = (),
    dry_run: bool = False,
) -> ChunkJob:
    """Submit a job for one chunk, unless the queue holds jobs of this run; return its job, or the first of those.

    Whether it is this chunk's turn is for the caller to know. Raises SlurmError.
    """
    submission = Submission(config, run_dir, tuple(overrides), tuple(sbatch_options))
    command = submission.command(chunk, chunk=chunk)
    if dry_run and shutil.which("squeue") is None:
        return ChunkJob(chunk, "to_submit", command=command)
    with locked(run_dir, dry_run=dry_run):
        if there := jobs_of(run_dir):
            return ChunkJob(chunk if there[0].name == NEXT else there[0].name, there[0].state, there[0].id)
        if dry_run:
            return ChunkJob(chunk, "to_submit", command=command)
        return ChunkJob(chunk, "submitted", submission.send(command), command=command)


def assign(queue: Sequence[QueuedJob], undone: Sequence[str]) -> dict[str, QueuedJob]:
    """Return which job trains which chunk: by name, and an array's tasks what is left, in order."""
    jobs = {job.name: job for job in queue if job.name != NEXT}
    left = [chunk for chunk in undone if chunk not in jobs]
    return jobs | dict(zip(left, (job for job in queue if job.name == NEXT), strict=False))


def submit(
    submission: Submission,
    chunks: Sequence[str],
    *,
    assigned: dict[str, QueuedJob],
    wanted: Sequence[str],
    as_array: bool,
    dry_run: bool,
    after: str = "",
) -> list[ChunkJob]:
    """Submit a job for each chunk of `wanted` that has none; return the jobs of `chunks`, which are not done, in order.

    wanted: follow each other in `chunks`. after: the job that the first one waits for when none of `chunks` has one.
    Raises ChunkError where a job in the queue would come before one that is to be submitted, SlurmError naming what was
    submitted before.
    """
    missing = [chunk for chunk in wanted if chunk not in assigned]
    _require_order(chunks, missing, assigned)
    queued_ids = list(dict.fromkeys(assigned[chunk].job_id for chunk in chunks if chunk in assigned))
    waits_for = queued_ids[-1] if queued_ids else after
    jobs = {chunk: ChunkJob(chunk, job.state, job.id) for chunk, job in assigned.items()}
    if as_array and missing:
        command = submission.command(NEXT, chunk=None, waits_for=waits_for, array=f"0-{len(missing) - 1}%1")
        job_id = "<job>" if dry_run else submission.send(command)
        state = "to_submit" if dry_run else "submitted"
        for task, chunk in enumerate(missing):
            jobs[chunk] = ChunkJob(chunk, state, f"{job_id}_{task}", waits_for, () if task else command)
        missing = []
    for chunk in missing:
        command = submission.command(chunk, chunk=chunk, waits_for=waits_for)
        job_id = f"<{chunk}>" if dry_run else _send_next(submission, command, list(jobs.values()))
        jobs[chunk] = ChunkJob(chunk, "to_submit" if dry_run else "submitted", job_id, waits_for, command)
        waits_for = job_id
    return [jobs.get(chunk, ChunkJob(chunk, "not_submitted")) for chunk in chunks]


def _send_next(submission: Submission, command: Sequence[str], before: Sequence[ChunkJob]) -> str:
    try:
        return submission.send(command)
    except SlurmError as error:
        num_submitted = sum(job.state == "submitted" for job in before)
        raise SlurmError(
            f"{error}\nsubmitted before: {num_submitted} jobs; the same command again goes on from there"
        ) from None


def _require_order(chunks: Sequence[str], missing: Sequence[str], assigned: dict[str, QueuedJob]) -> None:
    """Raise ChunkError when a chunk before `missing` has no job, or one after its first has one."""
    if not missing:
        return
    place = chunks.index(missing[0])
    if left_out := [chunk for chunk in chunks[:place] if chunk not in assigned]:
        raise ChunkError(
            f"chunk {missing[0]}: {left_out[0]} comes before it and is neither done nor in the queue; submit that first"
        )
    if behind := [chunk for chunk in chunks[place:] if chunk in assigned]:
        job = assigned[behind[0]]
        raise ChunkError(
            f"chunk {missing[0]}: neither done nor in the queue, but {behind[0]}, which comes later, "
            f"is (job {job.id}, {job.state}); `scancel {job.job_id}` if Slurm does not, and submit again"
        )


# --- command line ---


def table(jobs: Sequence[ChunkJob], num_done: int) -> str:
    """Return the jobs as lines for people; many chunks in a row that are alike are one line."""
    lines = [f"{'chunk':32} {'state':14} {'job':12} waits for"]
    lines += [f"{f'{num_done} chunks':32} done"] if num_done else []
    rest = list(jobs)
    while rest:
        alike = next((number for number, job in enumerate(rest) if job.state != rest[0].state), len(rest))
        shown = rest[:alike] if alike <= _SHOWN_IN_A_ROW else [rest[0], rest[1], rest[alike - 1]]
        for job in shown:
            if job is shown[-1] and alike > len(shown):
                lines.append(f"… {alike - len(shown)} more")
            state = job.state.replace("_", " ")
            lines.append(f"{job.chunk:32} {state:14} {job.job_id:12} {job.waits_for}".rstrip())
            lines += [f"    $ {shlex.join(job.command)}"] if job.state == "to_submit" and job.command else []
        rest = rest[alike:]
    return "\n".join(lines)


def _last_line(jobs: Sequence[ChunkJob], run_dir: Path) -> str:
    counts = {state: sum(job.state == state for job in jobs) for state in ("submitted", "to_submit", "not_submitted")}
    left = f"; {counts['not_submitted']} not submitted yet: run this again" if counts["not_submitted"] else ""
    if counts["to_submit"]:
        return f"nothing was submitted (--dry-run){left}"
    if counts["submitted"]:
        return f"{counts['submitted']} submitted; logs are in {logs_folder(run_dir)}, progress: squeue --me{left}"
    return f"nothing to submit: {'the queue holds what is to do' if jobs else 'all chunks are done'}{left}"


def _wanted(undone: Sequence[str], options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the chunks that are to have a job."""
    chosen = list(undone)
    if options.first is not None:
        require_in_campaign(options.first, names)
        later = names[names.index(options.first) :]
        chosen = [chunk for chunk in undone if chunk in later]
    if options.count is not None:
        chosen = chosen[: options.count]
    return chosen


def run(options: argparse.Namespace) -> tuple[list[ChunkJob], int]:
    """Submit what is missing; return the jobs of the chunks that are not done, and how many are.

    Raises ConfigError, ChunkError, LedgerError, SlurmError.
    """
    config = load_config(options.config, RunConfig, options.overrides)
    submission = Submission(options.config, options.run_dir, tuple(options.overrides), tuple(options.sbatch))
    is_printed_only = options.dry_run and shutil.which("squeue") is None
    with locked(options.run_dir, dry_run=options.dry_run):
        # The queue before the ledger: a job that ends in between is in both rather than in neither.
        queue = [] if is_printed_only else jobs_of(options.run_dir)
        campaign = read_campaign(
            config.data.workspace, config.data.chunks, RunDir(options.run_dir), epochs=epochs_of(config)
        )
        undone = in_turn([name for name in campaign.names if not campaign.is_done(name)], campaign.records)
        assigned = assign([job for job in queue if job.name == NEXT or job.name in undone], undone)
        wanted = _wanted(undone, options, campaign.names)
        if options.max_queued is not None:
            free = max(options.max_queued - len(assigned), 0)
            new = [chunk for chunk in wanted if chunk not in assigned][:free]
            wanted = [chunk for chunk in wanted if chunk in assigned or chunk in new]
        jobs = submit(
            submission, undone, assigned=assigned, wanted=wanted, as_array=options.array, dry_run=options.dry_run,
            after=_ending(queue, set(campaign.names) - set(undone)),
        )  # fmt: skip
    return jobs, len(campaign.names) - len(undone)


def _ending(queue: Sequence[QueuedJob], done: Container[str]) -> str:
    """Return the id of a job whose chunk is done, but which has not ended: it still holds the run's lock."""
    return next((job.job_id for job in queue if job.name in done and job.state in ("running", "completing")), "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.submit_chunks",
        description=__doc__.splitlines()[0],
        epilog="What stands after -- goes to sbatch: -- --gpus-per-node=8 --time=4:00:00",
    )
    parser.add_argument("config", type=Path, metavar="RUN.toml")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--from", dest="first", metavar="CHUNK", help="default: the first that is not done")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--count", type=_positive, metavar="N", help="so many chunks, with those that are queued")
    many.add_argument("--until-done", action="store_true", help="all chunks of the run (the default)")
    parser.add_argument("--max-queued", type=_positive, metavar="M", help="at most so many jobs in the queue at a time")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chain", action="store_true", help="a job per chunk, each after the one before (the default)")
    form.add_argument("--array", action="store_true", help="one array, of which one task runs at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch commands, submit nothing")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, print the table, and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    options.sbatch = words[split + 1 :]
    try:
        if Path.cwd() != ROOT:
            raise ValueError(f"paths in configs start at the checkout: run this in {ROOT}, not in {Path.cwd()}")
        jobs, num_done = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return code_of(error) if isinstance(error, ValueError) else BAD_USAGE
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if options.json:
        print(json.dumps({"done": num_done, "jobs": [asdict(job) for job in jobs]}, indent=2))
    else:
        print(f"{table(jobs, num_done)}\n{_last_line(jobs, options.run_dir)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
