"""`training encode-latents`: what a run trains, encoded once and ahead of it."""

import argparse
from pathlib import Path

from training.commands.common import add_run_arguments, run_config
from training.exit_codes import DONE

SUMMARY = "encode the pictures of chunks ahead of training, and captions that never change"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_run_dir=False)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: latents.folder")
    parser.add_argument("--chunk", help="default: all chunks of the run that are not done, and the validation's")
    parser.add_argument("--chunks", metavar="A:B", help="from chunk A to B, both included; names or numbers from 0")
    parser.add_argument("--text", action="store_true", help="the text encoder's outputs, too, as with latents.text")
    parser.add_argument("--part-index", type=int, default=0, metavar="I", help="this task's number, from 0")
    parser.add_argument("--num-parts", type=int, default=1, metavar="N", help="over how many tasks the work is spread")
    parser.add_argument("--verify", action="store_true", help="read all that is there, compare it with its hashes")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.latents.command import encode_latents

    lines = encode_latents(
        run_config(options),
        options.run_dir,
        output=options.output,
        chunk_name=options.chunk,
        chunks=options.chunks,
        with_text=options.text,
        part_index=options.part_index,
        num_parts=options.num_parts,
        dry_run=options.dry_run,
        verify=options.verify,
    )
    for line in lines:
        print(line, flush=True)
    return DONE
