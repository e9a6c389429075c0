"""Exported weights appear under their names when all files of an export are written, never one by one.

A disk that fills, or a kill, leaves a `.partial-` folder at most, and the weights of before. What is in the files is
the recipe's; which exports are kept is `training.retention`'s.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sharding.files import TEMPORARY_MARK, fsync_folder, naming_full_disk, replacing
from training.recipes.base import ExportFile


def write_export(
    folder: Path, export: Callable[[Path], Iterable[ExportFile]], *, licences: Sequence[Path] = ()
) -> list[ExportFile]:
    """Let `export` write its files into a folder that it is given, then move them into `folder`; return them there.

    licences: files copied beside the weights and into every diffusers folder. Files of the same names are replaced,
    others in `folder` stay. Raises DiskFullError, FileNotFoundError for a licence, and what `export` raises; then
    `folder` is as it was.
    """
    partial = folder.with_name(f"{folder.name}{TEMPORARY_MARK}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming_full_disk(folder):
            partial.mkdir(parents=True)
            written = list(export(partial))
            for target in (partial, *(path.parent for path in partial.glob("*/model_index.json"))):
                copy_licences(licences, target)
            folder.mkdir(exist_ok=True)
        for path in sorted(partial.iterdir()):
            _move(path, folder / path.name)
        fsync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [replace(file, path=folder / file.path.relative_to(partial)) for file in written]


def copy_licences(files: Sequence[Path], folder: Path) -> None:
    """Copy `save.licence_files` into a folder. Raises FileNotFoundError."""
    for source in files:
        if not source.is_file():
            raise FileNotFoundError(f"save.licence_files: {source}: no such file")
        with replacing(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        os.replace(target, source.with_name(f"{source.name}-before"))  # goes with the partial folder
    os.replace(source, target)
