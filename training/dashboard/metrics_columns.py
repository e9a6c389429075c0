"""metrics.jsonl as columns in memory, read on from where it was left; what was trimmed away is forgotten again.

A run's file may have gigabytes: it is read block by block (a thread of the server goes on meanwhile), and until it is
known whole, `sample` shows the run by rows from all over the file. No torch; nothing is written.
"""

import io
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from training.dashboard.grown_file import START, Place, last_lines, read_blocks, size_of

STEP, IMAGES = "global_step", "train/images_seen"
NAMES = (
    STEP, IMAGES, "train/loss", "validation/loss", "train/grad_norm", "speed/images_per_second", "data/wait_fraction",
)  # fmt: skip
"""What is kept of every row, beside all `lr/…`."""
_MERGE_BYTES, _MUCH_BYTES = 1 << 20, 1 << 21
_SAMPLE_BYTES = 8192
_LAST_BYTES = 1 << 17

Columns = Mapping[str, np.ndarray]
"""Name → values (rows,) float64, in the file's order; NaN where a row has none."""


@dataclass
class _Block:
    place: Place
    num_bytes: int
    columns: dict[str, np.ndarray]


class MetricsColumns:
    """See the module. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._blocks: list[_Block] = []
        self._joined: Columns | None = None
        self._lock = threading.Lock()
        self.num_bad_lines = 0
        """Lines that were no rows, of all that were read."""

    def read_on(self, *, for_seconds: float = math.inf) -> bool:
        """Take in what the file has that is not known; return whether it is known to the end."""
        deadline = time.monotonic() + for_seconds
        with self._lock:
            while self._blocks and not self._blocks[-1].place.still_holds(self._path):
                self._blocks.pop()
                self._joined = None
            for data, place in read_blocks(self._path, self._place):
                self._add(data, place)
                if time.monotonic() > deadline:
                    return False
            return True

    def catch_up(self) -> bool:
        """Take in what is new unless it is much, which is left to `read_on`; return whether the file is known."""
        return size_of(self._path) - self._place.num_bytes < _MUCH_BYTES and self.read_on()

    @property
    def _place(self) -> Place:
        return self._blocks[-1].place if self._blocks else START

    @property
    def known_fraction(self) -> float:
        """How much of the file is known: 1 when there is nothing to read."""
        size = size_of(self._path)
        return min(self._place.num_bytes / size, 1.0) if size else 1.0

    def columns(self) -> Columns:
        """Return what is known."""
        with self._lock:
            if self._joined is None:
                self._joined = _join([block.columns for block in self._blocks])
            return self._joined

    def sample(self, num_rows: int) -> Columns:
        """Return up to `num_rows` rows from all over the file, in order: one from each of as many places."""
        size, rows = size_of(self._path), []
        if not size:  # no metrics yet
            return _columns_of_rows([])
        with self._path.open("rb") as stream:
            for number in range(num_rows):
                stream.seek(size * number // num_rows)
                parts = stream.read(_SAMPLE_BYTES).split(b"\n", 2)
                if len(parts) == 3 and (row := _row(parts[1])) is not None:
                    rows.append(row)
        return _columns_of_rows(rows)

    def last_rows(self) -> list[dict[str, Any]]:
        """Return the newest rows, oldest first, whether or not the rest is known."""
        rows = (_row(line) for line in last_lines(self._path, num_bytes=_LAST_BYTES))
        return [row for row in rows if row is not None]

    def _add(self, data: bytes, place: Place) -> None:
        columns, num_bad = _parse(data)
        self.num_bad_lines += num_bad
        last = self._blocks[-1] if self._blocks else None
        if last is not None and last.num_bytes + len(data) < _MERGE_BYTES:
            joined = dict(_join([last.columns, columns]))
            self._blocks[-1] = _Block(place, last.num_bytes + len(data), joined)
        else:
            self._blocks.append(_Block(place, len(data), columns))
        self._joined = None


def _parse(data: bytes) -> tuple[dict[str, np.ndarray], int]:
    """Return the columns of whole lines, and how many were no rows. Arrow reads them, Python what Arrow refuses."""
    names = list(dict.fromkeys([*NAMES, *_rates(data)]))
    options = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema([(name, pa.float64()) for name in names]), unexpected_field_behavior="ignore"
    )
    read_options = pyarrow.json.ReadOptions(block_size=max(len(data) // 4, 1 << 20))
    try:
        table = pyarrow.json.read_json(io.BytesIO(data), read_options=read_options, parse_options=options)
    except pa.ArrowInvalid:  # "nan" and "inf" are strings in the file, or a line is damaged
        lines = data.splitlines()
        rows = [row for row in map(_row, lines) if row is not None]
        return _columns_of_rows(rows), len(lines) - len(rows)
    columns = {name: _floats(table.column(name)) for name in names}
    known = ~np.isnan(columns[STEP])
    return {name: values[known] for name, values in columns.items()}, int((~known).sum())


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """Return a float64 column with NaN for null. (Arrow's own ways there import pandas: a second.)"""
    array = column.combine_chunks()
    validity, data = array.buffers()
    values = np.frombuffer(data, np.float64, len(array), 8 * array.offset).copy()
    if validity is not None:
        bits = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")
        values[bits[array.offset : array.offset + len(array)] == 0] = np.nan
    return values


def _rates(data: bytes) -> list[str]:
    """Return the names of learning rates, which differ by recipe: those of the first and the last rows that train."""
    lines = data[:20_000].splitlines()[:3] + data[-20_000:].splitlines()[-3:]
    return [name for line in lines for name in _row(line) or () if name.startswith("lr/")]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get(STEP), int) else None


def _columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    rates = {name for row in rows for name in row if name.startswith("lr/")}
    return {name: np.array([_number(row.get(name)) for row in rows], dtype=np.float64) for name in (*NAMES, *rates)}


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return math.nan


def _join(parts: Sequence[Mapping[str, np.ndarray]]) -> Columns:
    names = list(dict.fromkeys([*NAMES, *(name for part in parts for name in part)]))
    return {
        name: np.concatenate([part.get(name, np.full(len(part[STEP]), np.nan)) for part in parts])
        if parts
        else np.zeros(0)
        for name in names
    }
