"""`training merge`: a file of adapters put into weights."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training.config.saving import ExportFormat, formats_of
from training.exit_codes import DONE

if TYPE_CHECKING:
    from training.recipes.base import ExportFile

SUMMARY = "put a LoRA, DoRA, LoHa or LoKr into weights of Stable Diffusion or stage C: files of kohya, diffusers, PEFT"
FORMATS = tuple(dict.fromkeys((*formats_of("stage_c"), *formats_of("dreambooth"))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("base", metavar="BASE", help="weights: a file or folder in any layout, or a hub id")
    parser.add_argument("adapters", type=Path, metavar="LORA", help=".safetensors file, or a folder that PEFT wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is as trained, 0 is the base; default: %(default)s")
    parser.add_argument("--text-encoder", metavar="FOLDER", help="of stage C, when no text model comes with BASE")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, dest="formats", help="may be repeated; default: original"
    )
    parser.add_argument(
        "--prediction", choices=("epsilon", "v_prediction"), help="of an SD 2 file that does not say what it predicts"
    )


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.dreambooth.adapters.recognised import is_stable_diffusion

    recipe = "dreambooth" if is_stable_diffusion(options.base) else "stage_c"
    formats = tuple(dict.fromkeys(options.formats or ("original",)))
    if unknown := [name for name in formats if name not in formats_of(recipe)]:
        raise ValueError(
            f"--format {unknown[0]}: {options.base} is of the recipe {recipe}; choose from "
            f"{', '.join(formats_of(recipe))}"
        )
    if recipe == "dreambooth" and options.text_encoder is not None:
        raise ValueError("--text-encoder is for stage C; Stable Diffusion's text models come with BASE")
    if recipe == "stage_c" and options.prediction is not None:
        raise ValueError("--prediction is for Stable Diffusion; stage C predicts epsilon")
    if options.dry_run:
        print(f"would write {', '.join(formats)} in {options.dtype} to {options.output}")
        return DONE
    for file in _merged(options, recipe, formats):
        print(file)
    return DONE


def _merged(options: argparse.Namespace, recipe: str, formats: tuple[ExportFormat, ...]) -> "list[ExportFile]":
    if recipe == "dreambooth":
        from training.dreambooth.adapters.merging import merge_sd
        from training.precision import DTYPES

        return merge_sd(
            options.base, options.adapters, options.output, scale=options.scale, formats=formats,
            dtype=DTYPES[options.dtype], prediction=options.prediction,
        )  # fmt: skip
    from training.config.saving import SaveConfig
    from training.stage_c.merge_files import merge_files

    save = SaveConfig(export_formats=formats, export_dtype=options.dtype)
    return merge_files(
        options.base, options.adapters, options.output, scale=options.scale, save=save,
        text_encoder=options.text_encoder,
    )  # fmt: skip
