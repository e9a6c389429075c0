"""Importers: what a source knows about a picture besides its pixels.

One file per importer, one line here. An importer never raises for what a file holds: a sidecar that cannot be used
becomes `Metadata.problem`, and the picture goes on without it.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sharding.metadata import booru, folder, pixiv, visual_novel
from sharding.metadata.base import Metadata, date_in_path, sidecar_paths

Importer = Callable[[Path, PurePosixPath], Metadata]
"""(root of the source, path below it) → Metadata."""

IMPORTERS: dict[str, Importer] = {
    "folder": folder.read_metadata,
    "booru": booru.read_metadata,
    "pixiv": pixiv.read_metadata,
    "visual_novel": visual_novel.read_metadata,
}

__all__ = ["IMPORTERS", "Importer", "Metadata", "date_in_path", "sidecar_paths"]
