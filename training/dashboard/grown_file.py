"""Read a file of lines that grows, and is now and then cut back, without reading again what is known."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 4 << 20
_TAIL_BYTES = 4096


class Place(NamedTuple):
    """How far a file was read, and what stood right before: a file that was cut back or replaced differs there."""

    num_bytes: int
    tail: bytes

    def still_holds(self, path: Path) -> bool:
        """Tell whether the file still begins as it did up to here, as far as the bytes right before tell."""
        if self.num_bytes == 0:
            return True
        try:
            with path.open("rb") as stream:
                stream.seek(self.num_bytes - len(self.tail))
                return stream.read(len(self.tail)) == self.tail
        except FileNotFoundError:
            return False


START = Place(0, b"")


def read_blocks(path: Path, place: Place, *, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[bytes, Place]]:
    """Yield (whole lines, place behind them), from `place` to the end; an unterminated last line is left out.

    A block has at least one line, however long that is. No file has none.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(place.num_bytes)
        known, rest = place, b""
        while data := stream.read(block_bytes):
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                block = whole + newline
                known = Place(known.num_bytes + len(block), (known.tail + block)[-_TAIL_BYTES:])
                yield block, known


def size_of(path: Path) -> int:
    """Return a file's size; 0 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def last_lines(path: Path, *, num_bytes: int) -> list[bytes]:
    """Return the whole lines within the last `num_bytes`, oldest first; no file has none."""
    try:
        with path.open("rb") as stream:
            start = max(0, stream.seek(0, os.SEEK_END) - num_bytes)
            stream.seek(start)
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return lines[1:] if start else lines
