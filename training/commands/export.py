"""`training export`: weights from a state, as other programs load them."""

import argparse
from pathlib import Path

from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

SUMMARY = "write weights from the newest state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_config=False)
    parser.add_argument("--chunk", help="a finished chunk whose state is kept; default: the newest state")
    parser.add_argument("--output", type=Path, help="folder; default: RUN/export")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: save.export_dtype")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.use_state import export_weights

    config = run_config(options)
    output = options.output or options.run_dir / "export"
    for line in export_weights(config, options.run_dir, output, chunk_name=options.chunk, dtype_name=options.dtype):
        print(line)
    return DONE
