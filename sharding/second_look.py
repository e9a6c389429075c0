"""What dedupe asks of the pictures' sketches and local features in the manifest: variants and crops.

Reads the columns `sketch` and `local_features` of the rows that are asked about, some thousand at a time. What makes a
variant is in `sketch`, what makes a crop in `crops`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sharding.candidates import Places

_PAIRS_HELD = 50_000

Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def variant_check(places: Places) -> Callable[[Rows, Rows], Flags]:
    """Return a function that tells of candidates whether each (left[i], right[i]) is a picture and its variant.

    It raises ValueError when the manifest has no sketches of this version.
    """
    from sharding.sketch import are_variants

    def check(left: Rows, right: Rows) -> Flags:
        result = np.zeros(len(left), dtype=bool)
        for start in range(0, len(left), _PAIRS_HELD):
            pairs = slice(start, start + _PAIRS_HELD)
            rows, inverse = np.unique(np.concatenate([left[pairs], right[pairs]]), return_inverse=True)
            sketches = places.read(rows, ["sketch"]).column("sketch").to_pylist()
            ends = [sketches[place] for place in inverse.tolist()]
            result[pairs] = are_variants(ends[: len(ends) // 2], ends[len(ends) // 2 :])
        return result

    return check


def crop_search(places: Places, rows: Rows) -> Callable[[], Rows]:
    """Return a function that finds all pairs (P, 2) of `rows` of which one is a part of the other, as places in `rows`.

    Holds the local features of all of them, about 1 kB each.
    """
    from sharding.crops import find_crops

    def search() -> Rows:
        found = find_crops(places.read(rows, ["local_features"]).column("local_features").to_pylist())
        return np.stack([found.left, found.right], axis=1)

    return search
