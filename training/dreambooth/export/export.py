"""Write the formats of `save.export_formats`, one after the other; each is read back before the next is begun.

original    model.safetensors: A1111, Forge, ComfyUI, kohya; laid over the file that training started from
ckpt        model.ckpt: the same as a pickle of tensors, for old programs
diffusers   diffusers/: a StableDiffusionPipeline or StableDiffusionXLPipeline
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.folder import write_sd_folder
from training.dreambooth.export.header import markers_of, whole_header
from training.dreambooth.export.model_card import write_sd_card
from training.dreambooth.export.verify import verify_export
from training.dreambooth.single_file.writing import write_single_file
from training.recipes.base import ExportFile
from training.weight_files import WeightsReport

ORIGINAL_FILE = "model.safetensors"
CKPT_FILE = "model.ckpt"
DIFFUSERS_FOLDER = "diffusers"
_SINGLE_FILES = {"original": ORIGINAL_FILE, "ckpt": CKPT_FILE}


def export_sd(
    content: SdWeights,
    folder: Path,
    *,
    formats: Sequence[str],
    dtype: torch.dtype,
    title: str,
    header: Mapping[str, str],
    card: Mapping[str, str | Sequence[str]] | None = None,
) -> list[ExportFile]:
    """Write the formats and return their files, with the values that did not fit dtype; see `verify_export`.

    header: entries of every weights file's metadata, with those of `sd_modelspec` or without; the architecture always
    is the model's. card: front matter of the diffusers folder's README. Raises ValueError for another format,
    WeightsError when the source file is gone or another, ExportMismatchError, DiskFullError.
    """
    if unknown := sorted(set(formats) - {*_SINGLE_FILES, "diffusers"}):
        raise ValueError(f"save.export_formats {', '.join(unknown)}: dreambooth writes original, ckpt and diffusers")
    header = whole_header(content.model, header, title=title)
    files: list[ExportFile] = []
    for name in dict.fromkeys(formats):
        if name == "diffusers":
            file = write_folder(content, folder / DIFFUSERS_FOLDER, dtype=dtype, title=title, header=header, card=card)
        else:
            file = _write_file(content, folder / _SINGLE_FILES[name], dtype, header)
        verify_export([file], content, dtype=dtype)
        files.append(file)
    return files


def write_folder(
    content: SdWeights,
    folder: Path,
    *,
    dtype: torch.dtype,
    title: str,
    header: Mapping[str, str],
    card: Mapping[str, str | Sequence[str]] | None = None,
) -> ExportFile:
    """Write a diffusers folder with its README, not yet read back."""
    reports = write_sd_folder(folder, content, dtype=dtype, header=header)
    write_sd_card(
        folder / "README.md",
        family=content.model.family,
        title=title,
        dtype_name=str(dtype).removeprefix("torch."),
        header=header,
        front=card or {},
    )
    return _file(folder, reports)


def _write_file(content: SdWeights, path: Path, dtype: torch.dtype, header: Mapping[str, str]) -> ExportFile:
    model = content.model
    report = write_single_file(
        path,
        content.parts,
        family=model.family,
        source=content.source,
        dtype=dtype,
        markers=markers_of(model),
        metadata=header,
    )
    return _file(path, [report])


def _file(path: Path, reports: Sequence[WeightsReport]) -> ExportFile:
    return ExportFile(path, sum(one.num_overflowed for one in reports), sum(one.num_vanished for one in reports))
