"""A plain folder: tags come from txt sidecars, comma separated, and are general."""

from pathlib import Path, PurePosixPath

from sharding.metadata.base import Metadata, text_sidecar_tags


def read_metadata(root: Path, path: PurePosixPath) -> Metadata:
    """Read the txt sidecar of a picture, if there is one."""
    tags, problem = text_sidecar_tags(root, path)
    return Metadata(tags=tags, problem=problem)
