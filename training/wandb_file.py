"""Read back what an offline launch wrote for W&B: which steps, and links to weights, a killed one got onto the disk.

W&B's own process writes a .wandb file in blocks of 32 KiB as they fill, so a kill loses what lies in memory. The file
is a header of 7 bytes and then a log in LevelDB's format: blocks of records, each with checksum (4 bytes), length (2)
and kind (1: whole; 2, 3, 4: first, middle, last piece); a record is a protobuf of W&B's.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER_BYTES, _RECORD_HEADER_BYTES, _BLOCK_BYTES = 7, 7, 32_768
_WHOLE, _LAST = 1, 4


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that were logged, in order, with their `_step`; what a kill cut off at the end is left out."""
    for history in _read(path, "history"):
        yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}


def read_links(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the artefacts of type model, in order: `name`, `aliases`, `references` by file name, and their metadata."""
    for artifact in _read(path, "artifact"):
        if artifact.type == "model":
            references = {entry.path: entry.ref for entry in artifact.manifest.contents}
            told = {"name": artifact.name, "aliases": sorted(artifact.aliases), "references": references}
            yield {**json.loads(artifact.metadata or "{}"), **told}


def last_step(paths: list[Path]) -> int | None:
    """Return the last step in the files of earlier launches, in their order; -1: no row in any; None: no files."""
    for path in reversed(paths):
        if steps := [row["_step"] for row in read_history(path) if "_step" in row]:
            return int(max(steps))
    return -1 if paths else None


def last_weights_step(paths: list[Path]) -> int | None:
    """Return the step of the last weights that earlier launches linked to; -1 and None as `last_step`."""
    for path in reversed(paths):
        if steps := [link["global_step"] for link in read_links(path) if "global_step" in link]:
            return int(max(steps))
    return -1 if paths else None


def _read(path: Path, kind: str) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == kind:
            yield getattr(record, kind)


def _records(data: bytes) -> Iterator[bytes]:
    position, record = _FILE_HEADER_BYTES, b""
    while True:
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _RECORD_HEADER_BYTES:
            position += left_in_block
        if position + _RECORD_HEADER_BYTES > len(data):
            return
        length, kind = struct.unpack_from("<HB", data, position + 4)
        position += _RECORD_HEADER_BYTES
        if position + length > len(data) or not _WHOLE <= kind <= _LAST:
            return
        record += data[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
