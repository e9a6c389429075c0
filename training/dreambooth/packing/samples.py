"""From a row to the sample that a shard stores: the file's own bytes where every reader takes them, else encoded."""

import hashlib
from collections.abc import Mapping
from typing import Any

from sharding.chunk import Sample
from sharding.images import ImageError, decode_rgb, encode_jpeg, encode_png
from sharding.schema import SCHEMA_VERSION
from training.dreambooth.packing.rows import Row
from training.errors import BrokenDataError

JPEG_QUALITY = 95
_EXTENSIONS = {"jpeg": "jpg", "png": "png"}


def sample_of(row: Row) -> Sample:
    """Return what is stored: upright sRGB JPEGs and PNGs without alpha byte for byte, others as PNG or JPEG of theirs.

    Raises BrokenDataError when the file is not the one that was read before.
    """
    picture = row.picture
    try:
        data = picture.place.read_bytes()
    except OSError as error:
        raise BrokenDataError(f"{picture.place}: {error.strerror}: it was there a moment ago; pack again") from error
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise BrokenDataError(f"{picture.place}: it changed while it was packed; pack again")
    image, extension, width, height = _stored(row, data)
    sha256 = hashlib.sha256(image).hexdigest()
    return Sample(
        key=row.key,
        image_name=f"{row.key}.{extension}",
        image=image,
        facts=_facts(row, width=width, height=height, image_sha256=sha256),
        caption=row.text,
        row={
            "width": width,
            "height": height,
            "groups": [],
            "dataset": row.label,
            "period": "",
            "repeats": row.turn.repeats,
            "loss_weight": row.loss_weight,
            "sha256": sha256,
        },
    )


def _stored(row: Row, data: bytes) -> tuple[bytes, str, int, int]:
    facts = row.picture.facts
    if facts.is_pass_through:
        return data, _EXTENSIONS[facts.format], facts.width, facts.height
    try:
        pixels = decode_rgb(data)
    except ImageError as error:
        raise BrokenDataError(f"{row.picture.place}: {error}") from error
    if facts.is_lossless:
        return encode_png(pixels), "png", *pixels.size
    return encode_jpeg(pixels, quality=JPEG_QUALITY), "jpg", *pixels.size


def _facts(row: Row, *, width: int, height: int, image_sha256: str) -> Mapping[str, Any]:
    """Return KEY.json, names as in the chunks of `sharding pack`; the folder that the picture is from is not in it."""
    picture = row.picture
    return {
        "schema": SCHEMA_VERSION,
        "key": row.key,
        "status": "success",
        "error_message": "",
        "caption": row.text,
        "width": width,
        "height": height,
        "original_width": picture.facts.width,
        "original_height": picture.facts.height,
        "image_size": [width, height],
        "sha256": picture.sha256,
        "image_sha256": image_sha256,
        "dataset": row.label,
        "source_path": picture.path,
        "file_size": picture.num_bytes,
    }
