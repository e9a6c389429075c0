"""Folder trees `[Project]/[Anime]/[name]/…`: a concept for each folder that holds pictures itself."""

from pathlib import Path
from typing import Any

from training.config.concepts import FILEWORDS
from training.dreambooth.concepts.imported import pictures_in


def read_folders(root: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return a table for each folder below `root` (or `root`) that has pictures, named after the folder."""
    tables = []
    holders = sorted({picture.parent for picture in pictures_in(root)})
    for folder in holders:
        if any(folder in other.parents for other in holders):
            notes.append(
                f"{folder}: has pictures and, below it, folders with pictures of their own: it takes theirs in, too; "
                "move its own pictures into a folder"
            )
        captioned = sum(picture.with_suffix(".txt").is_file() for picture in pictures_in(folder))
        prompt = FILEWORDS if captioned else folder.name
        if not captioned:
            notes.append(f"{folder}: no captions: every picture is trained with {prompt!r}")
        tables.append({"name": folder.name, "folder": str(folder), "prompt": prompt})
    return tables
