"""Importers: what a source knows about a picture besides its pixels.

One file per importer, one line here. An importer never raises for what lies beside a picture: a sidecar that cannot
be used becomes `Metadata.problem`, and the picture goes on without it. A table that the config names must be usable:
`check_tables` says so before anything is read.
"""

from pathlib import Path, PurePosixPath
from typing import Protocol

from sharding.metadata import anime_pictures, booru, folder, gelbooru, kohya, pixiv, visual_novel, webdataset
from sharding.metadata.base import Metadata, date_in_path, sidecar_paths
from sharding.metadata.tables import NO_TABLES, TableError, Tables, fingerprint, read_entries, read_table


class Importer(Protocol):
    """(root of the source, path below it, the source's tables) → Metadata."""

    def __call__(self, root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata: ...


IMPORTERS: dict[str, Importer] = {
    "folder": folder.read_metadata,
    "booru": booru.read_metadata,
    "gelbooru": gelbooru.read_metadata,
    "anime_pictures": anime_pictures.read_metadata,
    "pixiv": pixiv.read_metadata,
    "visual_novel": visual_novel.read_metadata,
    "kohya": kohya.read_metadata,
    "webdataset": webdataset.read_metadata,
}


def check_tables(tables: Tables) -> None:
    """Raise FileNotFoundError or TableError for a table that is missing or cannot be used."""
    for path in (tables.tag_dict, tables.tag_categories):
        if path is not None:
            read_table(path)
    if tables.metadata is not None:
        read_entries(tables.metadata)


__all__ = [
    "IMPORTERS", "NO_TABLES", "Importer", "Metadata", "TableError", "Tables", "check_tables", "date_in_path",
    "fingerprint", "sidecar_paths",
]  # fmt: skip
