"""Ask a run's ledger what is next, or what broke, say so in one sentence, and run it. Go back, or branch off.

    python -m scripts.resume_from_chunk --run-dir R                        the next chunk, or the half-trained one
    python -m scripts.resume_from_chunk --run-dir R --submit -- --time=4:00:00      the same as a Slurm job
    python -m scripts.resume_from_chunk --run-dir R --rewind newest/0005   go on from the end of that chunk
    python -m scripts.resume_from_chunk --run-dir R --chunk newest/0005 --fork R2 --set optimizer.learning_rate=5e-6

The settings are the run's own frozen run.toml. A half-trained chunk goes on from its newest state that verifies;
otherwise the next chunk starts from the state of the last finished one. Nobody types a checkpoint's path.
"""

import argparse
import getpass
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.launching import find_next, launch_chunk
from training.exit_codes import DONE, FAILED, code_of, is_foreseen
from training.run_dir import RunDir


def _parser() -> argparse.ArgumentParser:
    first, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.resume_from_chunk", description=first, epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--rewind", metavar="CHUNK",
        help="go on from the end of this chunk: later ones are superseded, their files moved to RUN/superseded",
    )  # fmt: skip
    way.add_argument("--fork", type=Path, metavar="NEW_RUN", help="go on from the end of --chunk in a new run folder")
    parser.add_argument("--chunk", help="with --fork: a finished chunk whose final state is kept")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="with --fork any key of run.toml, otherwise those that may change between launches",
    )  # fmt: skip
    parser.add_argument("--launcher", default="", help="put before `-m training run …`; default: plain python")
    parser.add_argument(
        "--submit", action="store_true", help="submit slurm/train_chunk.sbatch; what stands after -- goes to sbatch"
    )
    parser.add_argument("--no-launch", action="store_true", help="go back or branch off, but start nothing")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    return parser


def resume(options: argparse.Namespace) -> int:
    """Do what is asked for; return the exit code. Raises what the library raises for wrong input."""
    root, overrides, extra = options.run_dir, options.overrides, list[str]()
    if not RunDir(root).config_path.exists():
        raise FileNotFoundError(f"{root}: no run.toml; start it with `python -m training run` first")
    if options.rewind is not None:
        _rewind(options)
    elif options.fork is not None:
        _fork(options)
        root, overrides = options.fork, []
    if options.dry_run and (options.rewind is not None or options.fork is not None):
        return DONE
    found = find_next(RunDir(root).config_path, root, overrides, is_verifying=True)
    print(found.sentence, flush=True)
    if found.chunk is None or options.no_launch or (options.dry_run and not options.submit):
        return DONE
    if options.submit:
        return _submit(root, found.chunk, overrides, options)
    extra = [word for override in overrides for word in ("--set", override)]
    return launch_chunk(options.launcher, RunDir(root).config_path, root, found.chunk, extra)


def _rewind(options: argparse.Namespace) -> None:
    from training.rewind import plan_rewind, rewind

    if options.dry_run:
        print(plan_rewind(options.run_dir, options.rewind))
        return
    who = f"{getpass.getuser()} on {socket.gethostname()}"
    for line in rewind(options.run_dir, options.rewind, reason=f"rewind to {options.rewind}, asked for by {who}"):
        print(line, flush=True)


def _fork(options: argparse.Namespace) -> None:
    from training.fork import make_fork, plan_fork

    fork = plan_fork(options.run_dir, options.chunk, options.fork, overrides=options.overrides)
    print("\n".join(fork.text()), flush=True)
    if not options.dry_run:
        make_fork(fork)


def _submit(root: Path, chunk: str, overrides: Sequence[str], options: argparse.Namespace) -> int:
    from scripts.slurm_queue import ROOT, SlurmError
    from scripts.submit_chunks import submit_chunk

    if Path.cwd() != ROOT:
        raise ValueError(f"paths in configs start at the checkout: run this in {ROOT}, not in {Path.cwd()}")
    try:
        job = submit_chunk(
            RunDir(root).config_path, root, chunk, overrides=overrides, sbatch_options=options.sbatch,
            dry_run=options.dry_run,
        )  # fmt: skip
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if job.state == "to_submit":
        print(f"would submit: {' '.join(job.command)}")
    elif job.state == "submitted":
        print(f"submitted as job {job.job_id}")
    else:
        print(f"not submitted: job {job.job_id} of this run is in the queue ({job.chunk}, {job.state})")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do it, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options = parser.parse_args(words[:split])
    options.sbatch = words[split + 1 :]
    if (options.fork is None) != (options.chunk is None):
        parser.error("--chunk X and --fork NEW_RUN go together; without --fork the next chunk is found, not named")
    if options.submit and (options.launcher or options.no_launch):
        parser.error("--submit starts a job, which has its own launcher: leave out --launcher and --no-launch")
    if options.sbatch and not options.submit:
        parser.error(f"{' '.join(options.sbatch)}: what stands after -- is for sbatch; it needs --submit")
    try:
        return resume(options)
    except (ValueError, OSError) as error:
        if not is_foreseen(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return code_of(error)


if __name__ == "__main__":
    sys.exit(main())
