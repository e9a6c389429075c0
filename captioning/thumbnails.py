"""Small pictures for a page, made from the source files, else from packed chunks. What is in neither is left out."""

import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from captioning.config import CaptioningConfig
from captioning.images_in_tars import ALL_CHUNKS, ImagesInTars
from sharding.files import read_file
from sharding.images import ImageError, decode_rgb
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part

logger = logging.getLogger(__name__)

SIDE = 192
"""Pixels of a thumbnail's longer side."""
_QUALITY = 60


@dataclass(frozen=True)
class Thumbnail:
    """A small WebP. width, height: pixels of the thumbnail."""

    width: int
    height: int
    webp: bytes


def find_files(workspace: Workspace, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return (source, path) of kept pictures by key."""
    wanted = pa.array(sorted(set(keys)), pa.string())
    files: dict[str, tuple[str, str]] = {}
    for part in list_parts(workspace.kept) if len(wanted) else []:
        rows = read_part(part, ["key", "source", "path"])
        for row in rows.filter(pc.is_in(rows.column("key"), value_set=wanted)).to_pylist():
            files[row["key"]] = (row["source"], row["path"])
    return files


def make_thumbnails(config: CaptioningConfig, workspace: Workspace, keys: Iterable[str]) -> dict[str, Thumbnail]:
    """Return thumbnails of kept pictures by key, from their files, else from the chunks that they are packed in."""
    found = {}
    missing = []
    for key, (source, path) in find_files(workspace, keys).items():
        thumbnail = None
        if source in config.sources:
            thumbnail = _thumbnail(partial(read_file, config.sources[source].root, path), f"{source}/{path}")
        if thumbnail is None:
            missing.append(key)
        else:
            found[key] = thumbnail
    packed = ImagesInTars.open(workspace.chunks, [ALL_CHUNKS]).find(missing) if missing else {}
    for key, image in packed.items():
        thumbnail = _thumbnail(image.read, f"{image.tar}: {key}")
        if thumbnail is not None:
            found[key] = thumbnail
    return found


def _thumbnail(read: Callable[[], bytes], name: str) -> Thumbnail | None:
    try:
        image = decode_rgb(read(), min_side=SIDE)
    except (OSError, ImageError) as error:
        logger.info("no thumbnail of %s: %s", name, error)
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY)
    return Thumbnail(image.width, image.height, buffer.getvalue())
