"""Write and read named tensors as a .safetensors file: streamed, hashed on the way, without a second copy in memory.

The one writer of the project: states use `write_tensors`, weights for other programs go through
`training.stage_c.weight_files`, which converts them on the way. Any safetensors reader opens the files. Why not the
library's `save_file` and `load_file`: they build the bytes of all tensors in memory first (before 0.6), order metadata
differently in every process, the hash would need another pass over tens of gigabytes, and a load by mmap dies with
SIGBUS when a network file system loses the file. Pure file I/O on CPU tensors, safe in a background thread.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


def read_tensors(path: Path, *, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Read all tensors of a file into memory of their own, by name; hash the bytes on the way when a hash is given.

    Raises TensorFileError when the file is damaged.
    """
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    with path.open("rb", buffering=0) as stream:

        def fill(target: memoryview) -> None:
            while target:
                block = target[:_BLOCK_BYTES]
                count = stream.readinto(block)
                if not count:
                    raise TensorFileError(f"{path}: ends too early; damaged")
                digest.update(block[:count])
                target = target[count:]

        length = bytearray(8)
        fill(memoryview(length))
        num_header_bytes = int.from_bytes(length, "little")
        if num_header_bytes > _HEADER_LIMIT_BYTES:
            raise TensorFileError(f"{path}: not a safetensors file, or damaged: header of {num_header_bytes:,} bytes")
        text = bytearray(num_header_bytes)
        fill(memoryview(text))
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            position = 0
            for name, entry in entries:
                tensor = torch.empty(entry["shape"], dtype=_DTYPE_OF_NAME[entry["dtype"]])
                view = bytes_of(tensor)
                if entry["data_offsets"] != [position, position + len(view)]:
                    raise TensorFileError(f"{path}: {name}: its bytes are not where its size says; damaged")
                fill(view)
                tensors[name] = tensor
                position += len(view)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, TensorFileError):
                raise
            raise TensorFileError(f"{path}: header cannot be understood ({error}); damaged") from error
        if stream.read(1):
            raise TensorFileError(f"{path}: longer than its header says; damaged")
    if expected_sha256 is not None and digest.hexdigest() != expected_sha256:
        raise TensorFileError(f"{path}: SHA-256 {digest.hexdigest()[:12]}…, {expected_sha256[:12]}… is right; damaged")
    return tensors


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
