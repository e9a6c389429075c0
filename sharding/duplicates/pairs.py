"""The table `dedupe/pairs`: which pictures are like which, kept from run to run so that only what is new is searched.

A near, turned or variant pair depends on its two pictures and the settings alone, so the pairs of a set are those
among its old pictures, which are in the table, and those with a new one. Old is what stands in a part of the manifest
whose keys and hashes are those of the last run. Crops depend on how common their features are in the whole set, so they
are always searched in full. The result equals a full search, row for row.

Knows nothing of who stays; people's decisions and plans change no pair.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharding.duplicates.neighbours import near_pairs, near_pairs_between, unique_hashes
from sharding.files import digest_of
from sharding.schema import PAIR_KINDS, PAIRS
from sharding.tables import DamagedPartError, is_current, part_metadata, read_part, write_part

PAIRS_VERSION = 1
"""Raised when the same pictures would make other pairs."""
CROWD = 100
"""Of more pictures than this with one hash, each is paired with the first only, and only the first with others."""

_NEAR, _TURNED, _CROP, _VARIANT = range(4)
_NO_DISTANCE = -1

Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of keys, sorted by (left, right), each once, left < right.

    left, right: (P,) uint64; distance: (P,) int32 bits, -1 for a crop; kind: (P,) int8, position in PAIR_KINDS.
    """

    left: npt.NDArray[np.uint64]
    right: npt.NDArray[np.uint64]
    distance: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int8]

    @property
    def is_duplicate(self) -> Flags:
        """Whether the two are one picture; a picture and its variant are not."""
        is_duplicate: Flags = self.kind != _VARIANT
        return is_duplicate

    @property
    def is_crop(self) -> Flags:
        is_crop: Flags = self.kind == _CROP
        return is_crop

    def take(self, chosen: Any) -> "Pairs":
        return Pairs(self.left[chosen], self.right[chosen], self.distance[chosen], self.kind[chosen])

    @staticmethod
    def join(pieces: Sequence["Pairs"]) -> "Pairs":
        """Return all of them sorted; of two pairs of the same pictures the one whose kind comes first stays."""
        left, right, distance, kind = (
            np.concatenate([getattr(piece, name) for piece in (_EMPTY, *pieces)])
            for name in ("left", "right", "distance", "kind")
        )
        # A variant is what would be near: it comes before turns and crops.
        rank = np.array([0, 2, 3, 1], dtype=np.int8)[kind]
        order = np.lexsort((distance, rank, right, left))
        joined = Pairs(left[order], right[order], distance[order], kind[order])
        is_first = np.ones(len(left), dtype=bool)
        is_first[1:] = (joined.left[1:] != joined.left[:-1]) | (joined.right[1:] != joined.right[:-1])
        return joined.take(is_first)


_EMPTY = Pairs(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int8))


@dataclass(frozen=True)
class PairRules:
    """What makes a pair. radius: bits, for `near` and `turned`.

    are_variants(left, right): tells of rows of Pictures whether each near pair is a picture and its variant; None asks
    nothing. find_crops(): all pairs (P, 2) of rows of Pictures of which one is a part of the other; None looks for
    none. name: says which of these there are, and their versions, for the digest.
    """

    radius: int
    name: str = ""
    are_variants: Callable[[Rows, Rows], Flags] | None = None
    find_crops: Callable[[], Rows] | None = None


@dataclass(frozen=True)
class Pictures:
    """Every picture once, by key ascending. key: (N,); phash: (N, words); turned: (N, turns, words); uint64.

    is_comparable: whether the hash says something.
    """

    key: npt.NDArray[np.uint64]
    phash: npt.NDArray[np.uint64]
    turned: npt.NDArray[np.uint64]
    is_comparable: Flags


def update_pairs(
    stored: Path,
    pictures: Pictures,
    rules: PairRules,
    *,
    parts: Sequence[tuple[str, npt.NDArray[np.uint64]]],
    dry_run: bool = False,
) -> tuple[Pairs, int]:
    """Return (all pairs, number of pictures that were searched anew) and bring the table up to date.

    stored: the table; if it is damaged, absent or made by other rules, all is searched. parts: digest and keys of what
    pairs are made from in each part of the manifest.
    """
    digests = [digest for digest, _ in parts]
    settings = digest_of([PAIRS_VERSION, rules.radius, rules.name, CROWD, pictures.turned.shape[1:]])
    made_from = digest_of([settings, digests])
    known, known_digests = _read_pairs(stored, settings)
    if is_current(stored, made_from):
        return known, 0
    is_new = _are_new(pictures, [keys for digest, keys in parts if digest in known_digests], known)
    old = pictures.key[~is_new]
    among_old = _contains(old, known.left) & _contains(old, known.right) & ~known.is_crop
    pairs = Pairs.join([known.take(among_old), find_pairs(pictures, rules, is_new)])
    if not dry_run:
        facts = {"settings": settings, "parts": json.dumps(digests)}
        write_part(stored, _to_table(pairs), made_from=made_from, metadata=facts)
    return pairs, int(is_new.sum())


def find_pairs(pictures: Pictures, rules: PairRules, is_new: Flags) -> Pairs:
    """Return all crops, and all other pairs of which one picture at least is new.

    is_new must be the same for pictures of equal hash.
    """
    is_crowded, first_of_crowd = _crowds(pictures)
    listed = np.flatnonzero(pictures.is_comparable & ~is_crowded)
    crowded = np.flatnonzero(is_crowded & is_new)
    pieces = [_near(pictures, rules, is_new, listed, (first_of_crowd[crowded], crowded))]
    for turn in range(pictures.turned.shape[1]):
        pieces.append(_turned(pictures, turn, rules.radius, is_new, listed))
    if rules.find_crops is not None:
        found = rules.find_crops()
        pieces.append(
            _pairs(pictures.key, found[:, 0], found[:, 1], np.full(len(found), _NO_DISTANCE, np.int32), _CROP)
        )
    return Pairs.join(pieces)


def _near(
    pictures: Pictures, rules: PairRules, is_new: Flags, listed: Rows, crowds: tuple[Rows, Rows]
) -> Pairs:  # fmt: skip
    """crowds: pairs of the first picture of a crowd and another one of it."""
    new, old = listed[is_new[listed]], listed[~is_new[listed]]
    among = near_pairs(pictures.phash[new], rules.radius)
    across = near_pairs_between(pictures.phash[new], pictures.phash[old], rules.radius)
    left = np.concatenate([new[among.left], new[across.left], crowds[0]])
    right = np.concatenate([new[among.right], old[across.right], crowds[1]])
    distance = np.concatenate([among.distance, across.distance, np.zeros(len(crowds[0]), np.int32)])
    pairs = _pairs(pictures.key, left, right, distance, _NEAR)
    if rules.are_variants is not None:
        pairs.kind[rules.are_variants(left, right)] = _VARIANT
    return pairs


def _turned(pictures: Pictures, turn: int, radius: int, is_new: Flags, listed: Rows) -> Pairs:
    """Return the pairs of a turned picture and another as it is."""
    new, old = listed[is_new[listed]], listed[~is_new[listed]]
    turned = pictures.turned[:, turn]
    one = near_pairs_between(turned[new], pictures.phash[listed], radius)
    other = near_pairs_between(turned[old], pictures.phash[new], radius)
    left, right = (
        np.concatenate([new[one.left], old[other.left]]),
        np.concatenate([listed[one.right], new[other.right]]),
    )
    distinct = left != right  # a symmetrical picture is like its own turn
    distance = np.concatenate([one.distance, other.distance])
    return _pairs(pictures.key, left[distinct], right[distinct], distance[distinct], _TURNED)


def _pairs(
    keys: npt.NDArray[np.uint64], left: Rows, right: Rows, distance: npt.NDArray[np.int32], kind: int
) -> Pairs:  # fmt: skip
    low, high = np.minimum(left, right), np.maximum(left, right)  # keys are sorted as their rows are
    return Pairs(keys[low], keys[high], distance, np.full(len(low), kind, dtype=np.int8))


def _crowds(pictures: Pictures) -> tuple[Flags, Rows]:
    """Return (whether a picture is one of a crowd and not its first, the first picture with the same hash)."""
    first = np.arange(len(pictures.key))
    is_crowded = np.zeros(len(first), dtype=bool)
    rows = np.flatnonzero(pictures.is_comparable)
    if len(rows):
        _, inverse = unique_hashes(pictures.phash[rows])
        counts = np.bincount(inverse)
        first_of_hash = np.empty(len(counts), dtype=np.int64)
        first_of_hash[inverse[::-1]] = rows[::-1]  # of several that are written to one place the last stays
        first[rows] = first_of_hash[inverse]
        is_crowded[rows] = (counts[inverse] > CROWD) & (first[rows] != rows)
    return is_crowded, first


# --- what is new ---


def _are_new(pictures: Pictures, old_parts: Sequence[npt.NDArray[np.uint64]], known: Pairs) -> Flags:
    """Tell which pictures must be searched. All pictures of one hash are new or none is.

    Besides those that were not there, these are the pictures that had a pair with one that is gone: if that one was the
    first of a crowd, another is now.
    """
    if not old_parts:
        return np.ones(len(pictures.key), dtype=bool)
    old_keys = np.unique(np.concatenate(old_parts))
    is_new = ~_contains(old_keys, pictures.key)
    for end, other in ((known.left, known.right), (known.right, known.left)):
        widowed = np.unique(end[~_contains(old_keys, other)])
        is_new |= _contains(widowed, pictures.key)
    _, inverse = unique_hashes(pictures.phash)
    has_new = np.zeros(len(pictures.key), dtype=bool)
    has_new[inverse[is_new]] = True
    return has_new[inverse]


def _contains(ordered: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> Flags:
    """Tell for each key whether it stands in `ordered`, which is sorted."""
    if not len(ordered):
        return np.zeros(len(keys), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    found: Flags = ordered[places] == keys
    return found


# --- the table ---


def _read_pairs(path: Path, settings: str) -> tuple[Pairs, frozenset[str]]:
    """Return (the pairs, the digests of the parts that they are of); nothing if they were made by other rules."""
    try:
        facts = part_metadata(path)
        if facts.get("settings") != settings:
            return _EMPTY, frozenset()
        return read_pairs(path), frozenset(json.loads(facts["parts"]))
    except (FileNotFoundError, DamagedPartError):
        return _EMPTY, frozenset()


def read_pairs(path: Path) -> Pairs:
    """Read the table. Raises FileNotFoundError, DamagedPartError."""
    table = read_part(path)
    kind = pc.index_in(table.column("kind"), value_set=pa.array(PAIR_KINDS)).to_numpy().astype(np.int8)
    distance = pc.fill_null(table.column("distance"), _NO_DISTANCE).to_numpy()
    return Pairs(table.column("left").to_numpy(), table.column("right").to_numpy(), distance, kind)


def _to_table(pairs: Pairs) -> pa.Table:
    kinds = pa.DictionaryArray.from_arrays(pa.array(pairs.kind), pa.array(PAIR_KINDS)).cast(pa.string())
    distance = pa.array(pairs.distance, pa.int32(), mask=pairs.distance == _NO_DISTANCE)
    return pa.table([pa.array(pairs.left), pa.array(pairs.right), distance, kinds], schema=PAIRS)
