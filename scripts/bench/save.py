"""Saving a state: how long training stands still for it, and how long it takes in all.

Beside the copy of the same tensors in memory, and `cp` of the same bytes with fsync and their SHA-256, in turns.
"""

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scripts.bench.result import Bar, Result
from training.state import StateSaver, take_snapshot

_ROUNDS = 5
_BYTES, _FULL_BYTES = 256 << 20, 2 << 30
_TENSOR_ELEMENTS = 4 << 20


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is a folder on the disk to write to, the system's temporary one when None."""
    num_bytes = _FULL_BYTES if full else _BYTES
    names = range(num_bytes // (4 * _TENSOR_ELEMENTS))
    tensors = {"model": {f"weight.{name}": torch.rand(_TENSOR_ELEMENTS) for name in names}}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=data) as folder:
        root = Path(folder)
        source = root / "source"
        source.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors["model"].values()))
        for number in range(_ROUNDS):
            _take(seconds, "copy", lambda: _copy(tensors["model"]))
            _take(seconds, "cp_and_sha256", lambda: _cp_and_sha256(source, root / "copy"))
            for kind in ("asynchronous", "synchronous"):
                saver = StateSaver(asynchronous=kind == "asynchronous", check=lambda: None)
                begun = time.monotonic()
                saver.save(root / f"state-{number}", take_snapshot(tensors, {"global_step": number}))
                seconds.setdefault(f"blocked_{kind}", []).append(time.monotonic() - begun)
                saver.drain()
                seconds.setdefault(f"total_{kind}", []).append(time.monotonic() - begun)
                shutil.rmtree(root / f"state-{number}")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    figures = {f"{name}_seconds": value for name, value in median.items()} | {
        "blocked_over_copy": median["blocked_asynchronous"] / median["copy"],
        "total_over_cp_and_sha256": median["total_synchronous"] / median["cp_and_sha256"],
        "megabytes_per_second": num_bytes / 1e6 / median["total_synchronous"],
    }
    return Result(
        bench="save",
        figures=figures,
        bars=(Bar("blocked_over_copy", at_most=1.25), Bar("total_over_cp_and_sha256", at_most=1.25)),
        full_size=full,
        peer="torch's copy; shutil.copyfile with fsync and hashlib.sha256",
        notes=[f"a state of {num_bytes / 1e6:,.0f} MB in tensors of 17 MB; medians of {_ROUNDS} rounds"],
    )


def _take(seconds: dict[str, list[float]], name: str, act: Callable[[], object]) -> None:
    begun = time.monotonic()
    act()
    seconds.setdefault(name, []).append(time.monotonic() - begun)


def _copy(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor).copy_(tensor) for tensor in tensors.values()]


def _cp_and_sha256(source: Path, target: Path) -> str:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
