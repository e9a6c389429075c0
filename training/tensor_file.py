"""Write and read named tensors as a .safetensors file: streamed, hashed on the way, without a second copy in memory.

The one writer of the project: states use `write_tensors`, weights for other programs go through
`training.weight_files`, which converts them on the way. Any safetensors reader opens the files. Why not the
library's `save_file` and `load_file`: they build the bytes of all tensors in memory first (before 0.6), order metadata
differently in every process, the hash would need another pass over tens of gigabytes, and a load by mmap dies with
SIGBUS when a network file system loses the file. Pure file I/O on CPU tensors, safe in a background thread.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sharding.files import DiskFullError

_BLOCK_BYTES = 16 << 20
_HEADER_LIMIT_BYTES = 100_000_000
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorFileError(ValueError):
    """A tensor file is damaged, or tensors cannot be written to one."""


class WrittenFile(NamedTuple):
    """What a manifest says about a file."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write contiguous CPU tensors to `path` and fsync it. Tensors that share memory are written once each.

    Raises TensorFileError for tensors of another kind, DiskFullError.
    """
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise TensorFileError(
                f"{path}: {name}: take a snapshot first (contiguous, on the CPU, not {tensor.device})"
            )
    names, header = header_of(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    return write_file(path, [header, *(bytes_of(tensors[name]) for name in names)])


def header_of(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[list[str], memoryview]:
    """Return the order in which tensors must follow, and the bytes before them: the same for the same layout.

    Raises TensorFileError for a dtype that the format has no name for, or too many names. path: for the message.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    # Wide dtypes first, so that every tensor is aligned in the file.
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    for name in names:
        dtype, shape = layout[name]
        if dtype not in DTYPE_NAMES:
            raise TensorFileError(f"{path}: {name}: {dtype}; must be one of {', '.join(map(str, DTYPE_NAMES))}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT_BYTES:
        raise TensorFileError(f"{path}: the names of {len(layout):,} tensors take more than 100 MB; use fewer tensors")
    return names, memoryview(len(text).to_bytes(8, "little") + text)


def write_file(path: Path, parts: Iterable[memoryview]) -> WrittenFile:
    """Write bytes to `path` and fsync it; hash them on the way. Raises DiskFullError."""
    digest = hashlib.sha256()
    num_bytes = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), _BLOCK_BYTES):
                block = part[start : start + _BLOCK_BYTES]
                digest.update(block)
                num_bytes += len(block)
                while block:
                    block = block[os.write(descriptor, block) :]
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                errno.ENOSPC, f"disk full while writing {path}: free some space and run the same command again"
            ) from error
        raise
    finally:
        os.close(descriptor)
    return WrittenFile(num_bytes, digest.hexdigest())


class NamedTensors(Protocol):
    """Tensors by name, to go through once: a dict, or a TensorFile, which reads them one after the other."""

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Return names and tensors."""


class TensorFile:
    """A tensor file that is read one tensor at a time; here, its header. Raises TensorFileError when it is damaged."""

    def __init__(self, path: Path, *, expected_sha256: str | None = None) -> None:
        self._path, self._expected_sha256 = path, expected_sha256
        length = bytearray(8)
        with path.open("rb", buffering=0) as stream:
            self._fill(memoryview(length), stream)
            num_header_bytes = int.from_bytes(length, "little")
            if num_header_bytes > _HEADER_LIMIT_BYTES:
                raise TensorFileError(
                    f"{path}: not a safetensors file, or damaged: header of {num_header_bytes:,} bytes"
                )
            text = bytearray(num_header_bytes)
            self._fill(memoryview(text), stream)
        self._header = bytes(length + text)
        self._layout = _layout_of(path, text)
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in self._layout.values()]
        self._starts = dict(zip(self._layout, accumulate(sizes, initial=len(self._header)), strict=False))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the file's order."""
        return {name: tuple(shape) for name, (_, shape) in self._layout.items()}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors in the file's order, each in memory of its own; hash the bytes on the way.

        Raises TensorFileError when the file is damaged; a hash that is another one is known behind the last tensor.
        """
        digest = hashlib.sha256(self._header)
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(len(self._header))
            for name, (dtype, shape) in self._layout.items():
                tensor = torch.empty(shape, dtype=dtype)
                self._fill(bytes_of(tensor), stream, digest)
                yield name, tensor
                del tensor  # before the next one is made
            if stream.read(1):
                raise TensorFileError(f"{self._path}: longer than its header says; damaged")
        found, wanted = digest.hexdigest(), self._expected_sha256
        if wanted is not None and found != wanted:
            raise TensorFileError(f"{self._path}: SHA-256 {found[:12]}…, {wanted[:12]}… is right; damaged")

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, in memory of its own. Raises TensorFileError when the file ends before it does."""
        dtype, shape = self._layout[name]
        tensor = torch.empty(shape, dtype=dtype)
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(self._starts[name])
            self._fill(bytes_of(tensor), stream)
        return tensor

    def _fill(self, target: memoryview, stream: FileIO, digest: Any = None) -> None:
        while target:
            block = target[:_BLOCK_BYTES]
            count = stream.readinto(block)
            if not count:
                raise TensorFileError(f"{self._path}: ends too early; damaged")
            if digest is not None:
                digest.update(block[:count])
            target = target[count:]


def _layout_of(path: Path, header: bytearray) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return dtypes and shapes by name, in the file's order."""
    layout: dict[str, tuple[torch.dtype, list[int]]] = {}
    position = 0
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = _DTYPE_OF_NAME[entry["dtype"]], [int(size) for size in entry["shape"]]
            end = position + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [position, end] or min(shape, default=0) < 0:
                raise TensorFileError(f"{path}: {name}: its bytes are not where its size says; damaged")
            layout[name], position = (dtype, shape), end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TensorFileError):
            raise
        raise TensorFileError(f"{path}: header cannot be understood ({error}); damaged") from error
    return layout


def read_tensors(path: Path, *, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Read all tensors of a file, by name. Raises TensorFileError when the file is damaged."""
    return dict(TensorFile(path, expected_sha256=expected_sha256).items())


def shapes_of(tensors: NamedTensors) -> dict[str, tuple[int, ...]]:
    """Return shapes by name; of a file without reading a tensor."""
    shapes: dict[str, tuple[int, ...]] | None = getattr(tensors, "shapes", None)
    if shapes is not None:
        return shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of names, dtypes, shapes and values, wherever the tensors lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor.cpu().contiguous()))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without a copy; any dtype, 0-d and empty ones too."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
