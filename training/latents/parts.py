"""A part: tensors of many samples behind one another in one file, and a Parquet index of where each lies.

    part-00003.bin       values, little-endian, no header: np.memmap or pread by offset
    part-00003.parquet   one row per id: offset, num_bytes, shapes (of the tensors behind one another), crc32, reason
    part-00003.json      what both files hold, with their SHA-256; renamed last, it is the only commit

A row with a reason has no bytes: its sample could not be encoded and counts as broken in training. What the ids mean is
decided elsewhere (`wanted`). No torch.
"""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from sharding.chunk import ChunkError
from sharding.files import fsync_folder, locked, naming_full_disk, sha256_file, temporary_name, write_json
from sharding.tables import DamagedPartError, read_part, write_part

FORMAT = 1


class LatentsError(ChunkError):
    """Latents or text outputs are missing, damaged or of something else."""


@dataclass(frozen=True)
class PartFile:
    """What a manifest says about a file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PartInfo:
    """A committed part, as its manifest says."""

    dtype: str
    num_rows: int
    num_broken: int
    data: PartFile
    index: PartFile
    format: int = FORMAT


def part_stem(number: int) -> str:
    """Return the name of a part's files without suffix: `part-00003`."""
    return f"part-{number:05d}"


def read_info(folder: Path, number: int) -> PartInfo | None:
    """Return a part's manifest; None when there is none. Raises LatentsError when it is damaged or of another kind."""
    path = folder / f"{part_stem(number)}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise LatentsError(f"{path}: format {values['format']}, this program reads {FORMAT}; encode again")
        data, index = (PartFile(**values.pop(name)) for name in ("data", "index"))
        return PartInfo(**values, data=data, index=index)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, LatentsError):
            raise
        raise LatentsError(f"{path}: not a manifest ({error}); delete it and encode again") from error


def problems_of(folder: Path, number: int, *, with_data: bool) -> list[str]:
    """Return what is wrong with a part, by file; empty when nothing is. Missing files and sizes are always seen.

    with_data: read all values, too, and compare them with their hash; the index is compared in any case.
    """
    try:
        info = read_info(folder, number)
    except LatentsError as error:
        return [str(error)]
    if info is None:
        return [f"{folder / part_stem(number)}.json: missing"]
    problems = []
    for file, is_hashed in ((info.data, with_data), (info.index, True)):
        path = folder / file.name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (num_bytes := path.stat().st_size) != file.num_bytes:
            problems.append(f"{path}: {num_bytes:,} bytes, {file.num_bytes:,} are right")
        elif is_hashed and (actual := sha256_file(path)) != file.sha256:
            problems.append(f"{path}: SHA-256 {actual[:12]}…, {file.sha256[:12]}… is right")
    return problems


def read_rows(folder: Path, number: int) -> tuple[PartInfo, list[dict[str, Any]]]:
    """Return a part's manifest and the rows of its index. Raises LatentsError for whatever is missing or damaged."""
    if problems := problems_of(folder, number, with_data=False):
        raise LatentsError(problems[0])
    info = read_info(folder, number)
    assert info is not None
    try:
        return info, read_part(folder / info.index.name).to_pylist()
    except (FileNotFoundError, DamagedPartError) as error:
        raise LatentsError(str(error)) from error


class PartWriter:
    """Writes the part `number` of a folder. A context: without `commit` nothing stays.

    Tensors come as bytes, row by row, and go to the disk at once: of a part no more than the index is in memory.
    Raises DiskFullError.
    """

    def __init__(self, folder: Path, number: int, *, dtype: str) -> None:
        self._folder, self._number, self._dtype = folder, number, dtype
        self._path = folder / f"{part_stem(number)}.bin"
        self._rows: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._position = 0

    def __enter__(self) -> "PartWriter":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_name(self._path)
        self._stream: IO[bytes] = self._temporary.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk has been told already
            self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def add(
        self, facts: Mapping[str, Any], tensors: Sequence[memoryview], shapes: Sequence[Sequence[int]], reason: str = ""
    ) -> None:
        """Append a row. facts: its `id` and further columns. tensors: bytes, none of them when there is a reason."""
        start, crc32 = self._position, 0
        with naming_full_disk(self._path):
            for tensor in tensors if not reason else ():
                self._stream.write(tensor)
                self._digest.update(tensor)
                crc32 = zlib.crc32(tensor, crc32)
                self._position += len(tensor)
        place = {"offset": start, "num_bytes": self._position - start, "shapes": [list(shape) for shape in shapes]}
        self._rows.append({**facts, **place, "crc32": crc32, "reason": reason})

    @property
    def reasons(self) -> Counter[str]:
        """Rows so far that have no tensors, by reason."""
        return Counter(row["reason"].partition(":")[0] for row in self._rows if row["reason"])

    def commit(self) -> PartInfo:
        """Make the part what readers find; return its manifest, or another task's that has made it meanwhile."""
        with naming_full_disk(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        stem = part_stem(self._number)
        with locked(self._folder):
            if not problems_of(self._folder, self._number, with_data=False):
                info = read_info(self._folder, self._number)
                assert info is not None
                return info
            os.replace(self._temporary, self._path)
            fsync_folder(self._folder)
            data = PartFile(self._path.name, self._position, self._digest.hexdigest())
            index_path = self._folder / f"{stem}.parquet"
            write_part(index_path, _table(self._rows), made_from=data.sha256)
            index = PartFile(index_path.name, index_path.stat().st_size, sha256_file(index_path))
            info = PartInfo(self._dtype, len(self._rows), self.reasons.total(), data, index)
            write_json(self._folder / f"{stem}.json", asdict(info))
            return info


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    types = {"shapes": pa.list_(pa.list_(pa.int32())), "crc32": pa.uint32()}
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    return pa.table(columns)
