"""Keys as NumPy arrays: 16 bytes each, a quarter of what Python strings take, for the stages that hold all of them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_KEY_BYTES = 16
_BLOCK_ROWS = 500_000


def key_array(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Return keys as an array of 16 bytes each (dtype S16), 1/4 of the memory of Python strings."""
    if not len(column):
        return np.empty(0, dtype=f"S{_KEY_BYTES}")
    longest = pc.max(pc.binary_length(column)).as_py()
    if longest is None or longest > _KEY_BYTES or column.null_count:
        raise ValueError(f"a key of {longest} characters, or none at all; a key has {_KEY_BYTES}")
    padded = pc.ascii_rpad(column, _KEY_BYTES, padding="\0").cast(pa.binary()).cast(pa.binary(_KEY_BYTES))
    array = padded.combine_chunks() if isinstance(padded, pa.ChunkedArray) else padded
    pieces = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    return np.concatenate(
        [
            np.frombuffer(
                piece.buffers()[1], dtype=f"S{_KEY_BYTES}", count=len(piece), offset=piece.offset * _KEY_BYTES
            )
            for piece in pieces
        ]
    )


def is_in(keys: np.ndarray[Any, Any], among: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Tell for each key whether it stands in `among`; unlike `np.isin` with no more memory than a sorted copy."""
    found = np.zeros(len(keys), dtype=bool)
    if len(among):
        ordered = np.sort(among)
        for start in range(0, len(keys), _BLOCK_ROWS):
            block = keys[start : start + _BLOCK_ROWS]
            places = np.minimum(np.searchsorted(ordered, block), len(ordered) - 1)
            found[start : start + _BLOCK_ROWS] = ordered[places] == block
    return found
