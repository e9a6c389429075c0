"""A plain folder: tags come from txt sidecars, comma separated, and are general."""

from pathlib import Path, PurePosixPath

from sharding.metadata.base import Metadata, with_text_tags
from sharding.metadata.tables import NO_TABLES, Tables


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read the txt sidecar of a picture, if there is one."""
    return with_text_tags(Metadata(), root, path)
