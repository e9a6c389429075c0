"""`training resize-lora`: a file of LoRAs with smaller ranks."""

import argparse
from pathlib import Path

from training.exit_codes import DONE

SUMMARY = "write a LoRA file of kohya's layout with smaller ranks, the nearest there are (SVD); of any model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("file", type=Path, metavar="LORA", help=".safetensors, kohya's layout")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".safetensors")
    parser.add_argument("--rank", type=int, help="largest of each layer")
    parser.add_argument(
        "--share", type=float, default=1.0, help="smallest rank that keeps this share of a layer's change, such as 0.95"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp16", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    if options.output.suffix != ".safetensors":
        raise ValueError(f"--output {options.output}: must end in .safetensors")
    if options.dry_run:
        print(f"would write {options.file} in {options.dtype} to {options.output}")
        return DONE
    from training.lora.resizing import resize_file
    from training.lora.svd import summary
    from training.precision import DTYPES

    report, results = resize_file(
        options.file, options.output, rank=options.rank, share=options.share, dtype=DTYPES[options.dtype]
    )
    print(summary(results.values()))
    print(report.path)
    return DONE
