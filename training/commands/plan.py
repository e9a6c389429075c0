"""`training plan`: buckets, steps, exposures and memory, before anything is trained."""

import argparse
import json
from pathlib import Path

from training.commands.common import add_run_arguments, run_config
from training.config import RunConfig
from training.exit_codes import BAD_USAGE, DONE

SUMMARY = "show buckets, steps and exposures of a chunk; trains nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_run_dir=False)
    parser.add_argument("--chunk", help="default: the first chunk of the run that is not done")
    parser.add_argument("--processes", type=int, help="how many there will be; default: one")
    parser.add_argument("--image", type=Path, metavar="FILE", help="show source, resize, crop and bucket of a picture")
    parser.add_argument("--output", type=Path, metavar="PNG", help="with --image: draw it, too")
    parser.add_argument("--memory", action="store_true", help="what the run takes on each card, and what fits where")
    parser.add_argument("--json", action="store_true", help="the same numbers for programs")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    config = run_config(options)
    if options.image is not None:
        from training.placement_picture import image_text

        print(image_text(config, options.image, output=options.output))
        return DONE
    if options.memory:
        from training.memory.report import memory_report

        memory = memory_report(config, num_processes=options.processes or 1)
        print(json.dumps(memory.values(), indent=2) if options.json else memory.text())
        return DONE
    return _plan(config, options)


def _plan(config: RunConfig, options: argparse.Namespace) -> int:
    from training.inspect_run import inspect_plan

    report = inspect_plan(
        config, options.run_dir, chunk_name=options.chunk, num_processes=options.processes, with_state=True
    )
    if report is None:
        print("null" if options.json else f"all chunks of {options.run_dir} are done")
        return DONE
    print(json.dumps(report.values(), indent=2) if options.json else report.text())
    return BAD_USAGE if report.refusals else DONE
