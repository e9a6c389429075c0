"""What dedupe asks of the pictures' sketches and local features in the manifest: variants and crops.

Reads the columns `sketch` and `local_features` of the rows that are asked about, some thousand at a time. What makes a
variant is in `sketch`, what makes a crop in `crops`.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sharding.config import DedupeConfig
from sharding.duplicates.candidates import Places
from sharding.duplicates.pairs import PairRules
from sharding.pictures.local_features import FEATURES_VERSION
from sharding.pictures.sketch import SKETCH_VERSION, are_variants

_PAIRS_HELD = 50_000
_SAME_PART = 0.95  # of the larger picture; pictures that share more can be told to be variants

Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def variant_check(places: Places) -> Callable[[Rows, Rows], Flags]:
    """Return a function that tells of candidates whether each (left[i], right[i]) is a picture and its variant.

    It raises ValueError when the manifest has no sketches of this version.
    """

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


def crop_search(places: Places, rows: Rows, *, keep_variants: bool) -> Callable[[], Rows]:
    """Return a function that finds all pairs (P, 2) of `rows` of which one is a part of the other, as places in `rows`.

    keep_variants: two that show the same part but differ in a place are none. Holds the local features of all rows,
    about 1 kB each.
    """
    from sharding.duplicates.crops import find_crops

    def search() -> Rows:
        found = find_crops(places.read(rows, ["local_features"]).column("local_features").to_pylist())
        pairs = np.stack([found.left, found.right], axis=1)
        if not keep_variants:
            return pairs
        same_part = np.flatnonzero(found.share >= _SAME_PART)
        is_variant = np.zeros(len(pairs), dtype=bool)
        is_variant[same_part] = variant_check(places)(rows[pairs[same_part, 0]], rows[pairs[same_part, 1]])
        return pairs[~is_variant]

    return search


def pair_rules(dedupe: DedupeConfig, places: Places, rows: Rows) -> PairRules:
    """Return what makes a pair of the pictures that stand in `rows`, by their places in it."""
    rules = PairRules(radius=dedupe.radius)
    if dedupe.keep_variants:
        check = variant_check(places)
        rules = replace(rules, are_variants=lambda left, right: check(rows[left], rows[right]))
    if dedupe.find_crops:
        rules = replace(rules, find_crops=crop_search(places, rows, keep_variants=dedupe.keep_variants))
    versions = [SKETCH_VERSION * dedupe.keep_variants, FEATURES_VERSION * dedupe.find_crops]
    return replace(rules, name=f"sketch {versions[0]}, features {versions[1]}" if any(versions) else "")
