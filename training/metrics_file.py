"""metrics.jsonl: the truth about a run's metrics; trackers are fed from it.

One JSON line per row; a row has an integer `global_step`. Rows after the loaded state's step are dropped when a run
resumes, so no step is in it twice. Numbers that are not finite are kept as the strings "nan", "inf" and "-inf".
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sharding.files import open_replacing

logger = logging.getLogger(__name__)

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsError(ValueError):
    """A line of metrics.jsonl cannot be understood; the message names it."""


def append_metrics(path: Path, rows: Iterable[Mapping[str, Any]], *, durable: bool = False) -> None:
    """Append rows in one write. durable: wait for the disk, as before a state of these steps is saved.

    Raises ValueError for a row without an integer global_step.
    """
    data = b"".join(_encode(row) for row in rows)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows; no file has none. An unterminated last line (being written) is left out. Raises MetricsError."""
    for _, row in _read(path):
        yield {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def trim_metrics(path: Path, *, after_step: int) -> int:
    """Drop rows with global_step > after_step and an unterminated last line; return how many rows were dropped.

    The file is replaced whole or not at all, and left alone when there is nothing to drop. Raises MetricsError.
    """
    if not path.exists():
        return 0
    num_dropped = sum(1 for _, row in _read(path) if row["global_step"] > after_step)
    kept_bytes = sum(len(raw) for raw, _ in _read(path))
    if num_dropped == 0 and kept_bytes == path.stat().st_size:
        return 0
    if cut := path.stat().st_size - kept_bytes:
        logger.warning("%s: cut an unterminated last line of %d bytes", path, cut)
    with open_replacing(path) as stream:
        for raw, row in _read(path):
            if row["global_step"] <= after_step:
                stream.write(raw)
    return num_dropped


def copy_metrics(path: Path, target: Path, *, after_step: int = -1, up_to_step: int | None = None) -> int:
    """Write the rows of the steps after `after_step`, up to `up_to_step`, to `target`, whole or not at all.

    Return how many they are; without any, nothing is written. Raises MetricsError.
    """

    def chosen() -> Iterator[bytes]:
        for raw, row in _read(path):
            if after_step < row["global_step"] and (up_to_step is None or row["global_step"] <= up_to_step):
                yield raw

    if num_rows := sum(1 for _ in chosen()):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_replacing(target) as stream:
            stream.writelines(chosen())
    return num_rows


def _encode(row: Mapping[str, Any]) -> bytes:
    step = row.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"metrics row: global_step must be an integer, got {step!r}")
    safe = {name: repr(value) if _is_not_finite(value) else value for name, value in row.items()}
    return (json.dumps(safe, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (raw line with its end, row) of every whole line."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                row = json.loads(raw)
                row["global_step"]
            except (ValueError, KeyError, TypeError) as error:
                raise MetricsError(f"{path}: line {number}: not a metrics row ({error}); remove that line") from error
            yield raw, row
