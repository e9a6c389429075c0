"""Read latents and text outputs by id: some bytes at an offset, in whatever process asks.

Not by mmap, although the layout allows it: a network file system that loses the file would end the process with SIGBUS
instead of an error that names it.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from training.latents.parts import LatentsError, part_stem, read_rows

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Place(NamedTuple):
    """Where tensors lie, or why there are none. left, top: where the picture was cut, in pixels of the resized one."""

    part: int
    offset: int
    num_bytes: int
    shapes: list[list[int]]
    crc32: int
    reason: str
    left: int
    top: int


class StoredTensors:
    """The parts of one folder. Small when it travels to a worker: each process reads the indexes once.

    with_checksum: compare the CRC-32 of what is read. Raises LatentsError for what is missing or damaged.
    """

    def __init__(self, folder: Path, *, num_parts: int, with_checksum: bool) -> None:
        self._folder, self._num_parts, self._with_checksum = folder, num_parts, with_checksum
        self._places: dict[str, Place] = {}
        self._dtype = torch.float32
        self._files: dict[int, IO[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}, "_files": {}}

    def place(self, name: str) -> Place:
        """Return where the tensors of an id lie."""
        if not self._places:
            self._read_indexes()
        if name not in self._places:
            raise LatentsError(f"{self._folder}: holds nothing of {name!r}; encode again")
        return self._places[name]

    def tensors(self, place: Place) -> list[Tensor]:
        """Return the tensors, in the format they are stored in; zeros where there is a reason why there are none."""
        if place.reason:
            return [torch.zeros(shape, dtype=self._dtype) for shape in place.shapes]
        data = bytearray(self._read(place))
        if self._with_checksum and zlib.crc32(data) != place.crc32:
            raise LatentsError(
                f"{self._path(place.part)}: damaged: {place.num_bytes:,} bytes at {place.offset:,} are not what was "
                f"written; delete {part_stem(place.part)}.json beside it and run `python -m training encode-latents`"
            )
        values = torch.frombuffer(data, dtype=self._dtype)
        lengths = [torch.Size(shape).numel() for shape in place.shapes]
        return [one.reshape(shape) for one, shape in zip(torch.split(values, lengths), place.shapes, strict=True)]

    def close(self) -> None:
        """Close the files this process has open; the next read opens them again."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _read(self, place: Place) -> bytes:
        try:
            if place.part not in self._files:
                self._files[place.part] = self._path(place.part).open("rb", buffering=0)
            file = self._files[place.part]
            file.seek(place.offset)
            data = file.read(place.num_bytes)
        except OSError as error:
            raise LatentsError(f"{self._path(place.part)}: cannot be read: {error}") from error
        if len(data) != place.num_bytes:
            raise LatentsError(f"{self._path(place.part)}: cut short: nothing at byte {place.offset + len(data):,}")
        return data

    def _path(self, part: int) -> Path:
        return self._folder / f"{part_stem(part)}.bin"

    def _read_indexes(self) -> None:
        for number in range(self._num_parts):
            info, rows = read_rows(self._folder, number)
            self._dtype = DTYPES[info.dtype]
            for row in rows:
                self._places[row["id"]] = Place(
                    number, row["offset"], row["num_bytes"], row["shapes"], row["crc32"], row["reason"],
                    left=row.get("left", 0), top=row.get("top", 0),
                )  # fmt: skip


@dataclass(frozen=True)
class Ahead:
    """What was encoded ahead of one chunk; None: pixels, or the text encoder, as ever."""

    latents: StoredTensors | None = None
    text: StoredTensors | None = None

    def close(self) -> None:
        """Close the files this process has open."""
        for stored in (self.latents, self.text):
            if stored is not None:
                stored.close()
