"""Measure one thing beside its peers, in one run: `python -m scripts.bench NAME [--full] [--data DIR]`.

Prints a table and, as its last line, one JSON object. Ends with 0 whatever the figures say: a bench measures, tests
judge. One module per bench, one line in BENCHES; each makes its own data unless it is given a folder.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHES = {
    "scan": "read once (SHA-256, size, perceptual hash) against naive Pillow + imagehash and czkawka",
    "neighbours": "the search for near hashes against brute force",
    "doctor": "the data set doctor: precision and recall of each rule on planted faults, quiet on clean pictures",
    "dedupe": "precision and recall per kind of change, beside the peers'",
    "increment": "adding new pictures to a scanned and deduped set",
    "plan": "a plan of many rows: time and memory",
    "scale": "6 million files through dedupe, plan, combine and report: time and memory",
    "annotate": "five models at one decode per image, against the same ones run one script after the other",
    "pack": "read, checksum, write shards and index, against TarWriter and a copy",
    "memory": "the memory planner against processes of their own: loading and steps in many settings",
    "full_size": "one step of 3.59 + 0.69 billion parameters on a CPU: peak memory and seconds",
    "stage_c": "a step of stage C against a loop by hand around diffusers' network: time and memory",
    "kill": "random kills of a tiny run, against one that nobody disturbed",
    "kill_in_parts": "the same with a model in parts on two processes: FSDP2, DeepSpeed ZeRO-2",
    "kill_dreambooth": "the same with staged DreamBooth runs, of whole weights and of adapters",
    "elastic": "1, 3, 2 processes inside one chunk, against one process that nobody stopped",
    "loop": "a step of the training loop against forward, backward and optimizer by hand",
    "save": "a state: how long training stands still and all takes, against a copy in memory and cp with SHA-256",
    "loader": "decode, resize, crop and caption of a chunk, against the bare decode, webdataset and files",
    "latents": "what is loaded per second of CPU, from latents encoded ahead against from pixels",
    "start": "from the start of a run to its first batch, at three positions of a chunk",
    "dashboard": "the web page of a run of 708 chunks: time until all is drawn, and the server's",
    "compose": "captions of many rows after a threshold change: time and memory",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one bench and print its result."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "name", choices=BENCHES, metavar="NAME", help="; ".join(f"{n}: {w}" for n, w in BENCHES.items())
    )
    parser.add_argument("--full", action="store_true", help="the size that the bar speaks of")
    parser.add_argument("--data", type=Path, metavar="DIR", help="measure on the pictures in this folder")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    bench = importlib.import_module(f"scripts.bench.{options.name}")
    bench.run(full=options.full, data=options.data).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
