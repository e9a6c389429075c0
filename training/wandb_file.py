"""Read back what an offline launch wrote for W&B: which steps a killed one got onto the disk.

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
    from wandb.proto import wandb_internal_pb2

    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def last_step(paths: list[Path]) -> int | None:
    """Return the last step in the files of earlier launches, in their order; -1: no row in any; None: no files."""
    for path in reversed(paths):
        if steps := [row["_step"] for row in read_history(path) if "_step" in row]:
            return int(max(steps))
    return -1 if paths else None


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
