"""`training extract-lora`: what differs between two Stable Diffusion models, as a LoRA."""

import argparse
from pathlib import Path

from training.exit_codes import DONE

SUMMARY = "make a LoRA of the difference between two Stable Diffusion models: the nearest of its rank (SVD)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("base", metavar="BASE", help="a .safetensors or .ckpt file, a diffusers folder or a hub id")
    parser.add_argument("tuned", metavar="TUNED", help="the same, of a model that was trained from BASE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".safetensors, kohya's layout")
    parser.add_argument("--rank", type=int, default=32, help="largest of each layer; default: %(default)s")
    parser.add_argument("--conv-rank", type=int, help="take 3×3 convolutions, too, with this rank")
    parser.add_argument(
        "--share", type=float, default=1.0, help="smallest rank that keeps this share of a layer's change, below 1"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp16", help="default: %(default)s")
    parser.add_argument(
        "--prediction", choices=("epsilon", "v_prediction"), help="of an SD 2 file that does not say what it predicts"
    )


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    if options.rank < 1 or (options.conv_rank is not None and options.conv_rank < 1) or not 0 < options.share <= 1:
        raise ValueError("--rank and --conv-rank must be 1 or more, --share above 0 and at most 1")
    if options.output.suffix != ".safetensors":
        raise ValueError(f"--output {options.output}: must end in .safetensors")
    if options.dry_run:
        print(f"would write LoRAs of rank {options.rank} in {options.dtype} to {options.output}")
        return DONE
    from training.dreambooth.adapters.extracting import extract_sd
    from training.lora.svd import summary
    from training.precision import DTYPES

    extracted = extract_sd(
        options.base, options.tuned, options.output, rank=options.rank, conv_rank=options.conv_rank,
        share=options.share, dtype=DTYPES[options.dtype], prediction=options.prediction,
    )  # fmt: skip
    for part, layers in extracted.layers.items():
        print(f"{part}: {summary(layers.values())}")
    print(f"{extracted.outside:.1%} of the squared change is in weights that the LoRA does not reach")
    print(extracted.report.path)
    return DONE
