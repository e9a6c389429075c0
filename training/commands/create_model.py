"""`training create-model`: a Stable Diffusion model of any form, as a diffusers folder."""

import argparse
from pathlib import Path

from training.exit_codes import DONE

SUMMARY = "make a diffusers folder of a Stable Diffusion file, offline, its running average (EMA) beside it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("source", metavar="SOURCE", help="a .safetensors or .ckpt file, a diffusers folder or a hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--ema",
        choices=("both", "ema", "plain"),
        help="write the running average beside the plain UNet, in its place, or not; default: both where there is one",
    )
    parser.add_argument("--vae", help='in place of its own: a file, a folder, a hub id, or "sdxl-fp16-fix"')
    parser.add_argument(
        "--prediction", choices=("epsilon", "v_prediction"), help="in place of what it says; an SD 2 may say nothing"
    )
    parser.add_argument("--half", action="store_true", help="write fp16 instead of fp32")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    import torch

    from training.dreambooth.export.create import create_model, open_source

    source = open_source(options.source, average=options.ema, vae=options.vae, prediction=options.prediction)
    for fact in source.facts():
        print(fact)
    if options.dry_run:
        print(f"would write {'fp16' if options.half else 'fp32'} to {options.output}")
        return DONE
    for file in create_model(source, options.output, dtype=torch.float16 if options.half else torch.float32):
        print(file)
    return DONE
