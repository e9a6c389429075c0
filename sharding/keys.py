"""Keys as NumPy arrays, for the stages that hold all of them: 16 bytes each as text, 8 as numbers."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_KEY_BYTES = 16
_BLOCK_ROWS = 500_000
_LETTERS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_DIGIT_OF_LETTER = np.full(256, 255, dtype=np.uint8)
_DIGIT_OF_LETTER[_LETTERS] = np.arange(16)


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


def key_numbers(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Return keys as uint64, which sort as their text does. Raises ValueError for what is no key."""
    texts = key_array(column)
    numbers = np.empty(len(texts), dtype=np.uint64)
    for start in range(0, len(texts), _BLOCK_ROWS):
        letters = texts[start : start + _BLOCK_ROWS].view(np.uint8).reshape(-1, _KEY_BYTES)
        digits = _DIGIT_OF_LETTER[letters]
        if (digits > 15).any():
            wrong = texts[start + int(np.nonzero((digits > 15).any(axis=1))[0][0])]
            raise ValueError(f"{wrong.decode('ascii', 'replace')!r} is no key, which has 16 of the digits 0-9 a-f")
        joined = np.ascontiguousarray(digits[:, 0::2] << 4 | digits[:, 1::2])
        numbers[start : start + _BLOCK_ROWS] = joined.view(">u8").ravel()
    return numbers


def key_texts(numbers: np.ndarray[Any, Any]) -> pa.Array:
    """Return keys as text from their numbers."""
    octets = np.ascontiguousarray(numbers, dtype=">u8").view(np.uint8).reshape(-1, _KEY_BYTES // 2)
    letters = np.empty((len(octets), _KEY_BYTES), dtype=np.uint8)
    letters[:, 0::2], letters[:, 1::2] = _LETTERS[octets >> 4], _LETTERS[octets & 15]
    fixed = pa.Array.from_buffers(pa.binary(_KEY_BYTES), len(letters), [None, pa.py_buffer(letters)])
    return fixed.cast(pa.binary()).cast(pa.string())


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
