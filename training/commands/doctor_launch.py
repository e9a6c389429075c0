"""`training doctor-launch`: what a launch looks like from inside, before it trains."""

import argparse
import os
import sys
from pathlib import Path

from sharding.files import write_json
from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

SUMMARY = "check processes, devices, network, shared folder, clocks, data and room of a launch; trains nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser)
    parser.add_argument("--processes", type=int, help="how many the launcher was asked for")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for each phase; who is silent then is named"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and the exit code")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.launch_doctor.examination import examine

    config = run_config(options)
    report = examine(config, options.run_dir, num_processes=options.processes, timeout_seconds=options.timeout)
    if report is None:
        return DONE  # rank 0 has the report and the code
    if int(os.environ.get("RANK", "0")) == 0:
        print(report.text())
        if options.json is not None and not options.dry_run:
            write_json(options.json, report.values())
    else:  # rank 0 may be the one that is missing
        for row in report.rows:
            print(f"error: rank {os.environ['RANK']}: {row.found}; {row.advice}", file=sys.stderr)
    if report.is_hung:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(report.code)  # a thread is still inside a collective: the interpreter would wait for it at its end
    return report.code
