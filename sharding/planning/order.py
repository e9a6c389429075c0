"""Arrays that plan and pack work with: names as numbers, keys' rows, and the seeded order of a dataset's keys."""

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def name_codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return the distinct names, sorted, and each row's number among them."""
    names = sorted(pc.unique(column).to_pylist())
    return names, pc.index_in(column, value_set=pa.array(names, pa.string())).to_numpy().astype(np.int64)


def places(among: np.ndarray[Any, Any], keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return for each key its row in `among`, or -1. Ordered look-ups are much faster, so both are sorted first."""
    found = np.full(len(keys), -1, dtype=np.int32)
    if len(among):
        among_order, key_order = np.argsort(among), np.argsort(keys)
        sorted_among, sorted_keys = among[among_order], keys[key_order]
        at = np.minimum(np.searchsorted(sorted_among, sorted_keys), len(among) - 1)
        is_found = sorted_among[at] == sorted_keys
        found[key_order[is_found]] = among_order[at[is_found]]
    return found


class KeyRows:
    """Finds the rows of many keys, some at a time."""

    def __init__(self, keys: np.ndarray[Any, Any]) -> None:
        """keys: as `key_numbers` gives them, each once."""
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]

    def of(self, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return for each key its row, or -1."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[at] == keys, self._order[at], -1)


def are_sealed(plan: pa.Table, sealed: Collection[tuple[str, int]]) -> np.ndarray[Any, Any]:
    """Tell for each row of a plan whether its (dataset, chunk) is in `sealed`."""
    names, codes = name_codes(plan.column("dataset"))
    chunks = plan.column("chunk").to_numpy()
    width = int(chunks.max(initial=0)) + 2
    wanted = [names.index(name) * width + chunk + 1 for name, chunk in sealed if name in names and chunk < width - 1]
    return np.isin(codes * width + chunks + 1, wanted)


def spans_of(names: list[str], codes: np.ndarray[Any, Any]) -> dict[str, tuple[int, int]]:
    """Return name → (first row, rows) of a column that is sorted; arguments as `name_codes` gives them."""
    starts = np.searchsorted(codes, np.arange(len(names) + 1)).tolist()
    return {name: (start, end - start) for name, start, end in zip(names, starts, starts[1:], strict=False)}


def shuffled_ranks(keys: np.ndarray[Any, Any], *, seed: int, salt: str) -> np.ndarray[Any, Any]:
    """Return each key's rank in the seeded shuffle: by a hash of (seed, salt, key), then by key.

    keys: as `key_array` gives them. The hash is SplitMix64's finalizer over the key's two words (Steele, Lea, Flood:
    Fast Splittable Pseudorandom Number Generators, 2014), started from SHA-256 of seed and salt.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{salt}".encode()).digest()[:8], "little")
    words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    with np.errstate(over="ignore"):
        hashed = _mix(_mix(words[:, 0] ^ np.uint64(start)) + words[:, 1])
    ranks = np.empty(len(keys), dtype=np.int64)
    text_order = words.byteswap()  # compares as the text does, much faster
    ranks[np.lexsort((text_order[:, 1], text_order[:, 0], hashed))] = np.arange(len(keys))
    return ranks


def _mix(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[Any, Any] = words ^ (words >> np.uint64(31))
    return mixed
