"""`training merge`: a file of adapters put into weights."""

import argparse
from pathlib import Path

from training.commands.export import FORMATS
from training.exit_codes import DONE

SUMMARY = "put a LoRA, DoRA, LoHa or LoKr of stage C into weights: kohya's, the official code's or PEFT's files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("base", metavar="BASE", help="weights: a file or folder in any layout, or a hub id")
    parser.add_argument("adapters", type=Path, metavar="LORA", help=".safetensors file, or a folder that PEFT wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is as trained, 0 is the base; default: %(default)s")
    parser.add_argument("--text-encoder", metavar="FOLDER", help="when no text model comes with BASE")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, dest="formats", help="may be repeated; default: original"
    )


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.config.saving import SaveConfig

    formats = tuple(dict.fromkeys(options.formats or ("original",)))
    save = SaveConfig(export_formats=formats, export_dtype=options.dtype)
    if options.dry_run:
        print(f"would write {', '.join(formats)} in {options.dtype} to {options.output}")
        return DONE
    from training.stage_c.merge_files import merge_files

    for file in merge_files(
        options.base, options.adapters, options.output, scale=options.scale, save=save,
        text_encoder=options.text_encoder,
    ):  # fmt: skip
        print(file)
    return DONE
