"""Find all pairs of hashes that differ in few bits, exactly.

Multi-index hashing: a hash is cut into bands of 16 bits, and each band is given a bound such that two hashes which
differ in at most `radius` bits stay within the bound of some band (`_band_bounds`); only hashes whose band is that
near are compared in full. A pair is reported in the first such band and nowhere else. Threads share the work; the
result does not depend on them.

Knows nothing of pictures. Source: Norouzi, Punjani, Fleet, "Fast exact search in Hamming space with multi-index
hashing", 2014.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_BAND_BITS = 16
_NUM_VALUES = 1 << _BAND_BITS
_VALUES_PER_TASK = 128
_SMALL = 20_000  # fewer hashes are one task per band
_FIRST_CAPACITY = 4096


@dataclass(frozen=True)
class NearPairs:
    """Pairs of rows, sorted by (left, right), with the number of bits in which they differ.

    left, right: (P,) int64; distance: (P,) int32. Within one set of hashes left < right.
    """

    left: Rows
    right: Rows
    distance: npt.NDArray[np.int32]


def unique_hashes(hashes: Hashes) -> tuple[Hashes, Rows]:
    """Return (distinct, inverse): hashes[i] == distinct[inverse[i]]; distinct is sorted, first word first."""
    _check(hashes)
    order = np.lexsort(hashes.T[::-1])
    ordered = hashes[order]
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(hashes), dtype=np.int64)
    inverse[order] = np.cumsum(is_first) - 1
    return ordered[is_first], inverse


def near_pairs(hashes: Hashes, radius: int) -> NearPairs:
    """Return every pair of rows whose hashes differ in at most `radius` bits.

    hashes: (N, words) uint64, 16 × 4 × words bits. k equal hashes make k(k-1)/2 pairs: call `unique_hashes` first
    where that could be many.
    """
    distinct, inverse = unique_hashes(hashes)
    found = _join(distinct, distinct, radius, is_same=True)
    if len(distinct) == len(hashes):
        position = np.empty(len(hashes), dtype=np.int64)
        position[inverse] = np.arange(len(hashes))
        return _sorted_pairs(position[found.left], position[found.right], found.distance, is_same=True)
    members = _members(inverse, len(distinct))
    repeated = np.nonzero(np.diff(members[1]) > 1)[0]
    equal = _expand(NearPairs(repeated, repeated, np.zeros(len(repeated), np.int32)), members, members)
    once = equal.left < equal.right
    near = _expand(found, members, members)
    return _sorted_pairs(
        np.concatenate([near.left, equal.left[once]]),
        np.concatenate([near.right, equal.right[once]]),
        np.concatenate([near.distance, equal.distance[once]]),
        is_same=True,
    )


def near_pairs_between(new: Hashes, old: Hashes, radius: int) -> NearPairs:
    """Return every pair (row of new, row of old) whose hashes differ in at most `radius` bits.

    Together with `near_pairs(new)` this is what an increment adds to the pairs among `old`.
    """
    if new.shape[1:] != old.shape[1:]:
        raise ValueError(f"hashes of {new.shape[1]} and {old.shape[1]} words cannot be compared")
    new_distinct, new_inverse = unique_hashes(new)
    old_distinct, old_inverse = unique_hashes(old)
    found = _join(new_distinct, old_distinct, radius, is_same=False)
    pairs = _expand(found, _members(new_inverse, len(new_distinct)), _members(old_inverse, len(old_distinct)))
    return _sorted_pairs(pairs.left, pairs.right, pairs.distance, is_same=False)


def _check(hashes: Hashes) -> None:
    if hashes.ndim != 2 or hashes.dtype != np.uint64:
        raise ValueError(f"hashes must be (N, words) uint64, got {hashes.shape} {hashes.dtype}")


def _members(inverse: Rows, num_distinct: int) -> tuple[Rows, Rows]:
    """Return (rows ordered by their distinct hash, start of each distinct hash in them)."""
    starts = np.zeros(num_distinct + 1, dtype=np.int64)
    np.cumsum(np.bincount(inverse, minlength=num_distinct), out=starts[1:])
    return np.argsort(inverse, kind="stable"), starts


def _expand(found: NearPairs, left: tuple[Rows, Rows], right: tuple[Rows, Rows]) -> NearPairs:
    """Replace each pair of distinct hashes by all pairs of the rows that hold them."""
    num_left = np.diff(left[1])[found.left]
    num_right = np.diff(right[1])[found.right]
    num_pairs = num_left * num_right
    pair = np.repeat(np.arange(len(num_pairs)), num_pairs)
    place = np.arange(len(pair)) - np.repeat(np.cumsum(num_pairs) - num_pairs, num_pairs)
    return NearPairs(
        left[0][left[1][found.left[pair]] + place // num_right[pair]],
        right[0][right[1][found.right[pair]] + place % num_right[pair]],
        found.distance[pair],
    )


def _sorted_pairs(left: Rows, right: Rows, distance: npt.NDArray[np.int32], *, is_same: bool) -> NearPairs:
    if is_same:
        left, right = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((right, left))
    return NearPairs(left=left[order], right=right[order], distance=distance[order])


# --- the join of two sets of distinct hashes, one band after the other ---


def _join(left: Hashes, right: Hashes, radius: int, *, is_same: bool) -> NearPairs:
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    bands = _varying_bands(left, right)
    bounds = _band_bounds(radius, len(bands))
    lefts, rights, distances = [], [], []
    step = _VALUES_PER_TASK if len(left) > _SMALL else _NUM_VALUES
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for number, bound in enumerate(bounds.tolist()):
            band, masks = int(bands[number]), _masks(bound)
            left_side = _sort_by_band(left, band)
            right_side = left_side if is_same else _sort_by_band(right, band)

            def join_values(
                first: int, number: int = number, masks: Rows = masks, sides: Any = (left_side, right_side)
            ) -> Any:
                bands_so_far = (bands, bounds, number)
                return _join_values(sides[0], sides[1], masks, bands_so_far, radius, is_same, (first, first + step))

            for pairs in pool.map(join_values, range(0, _NUM_VALUES, step)):
                lefts.append(left_side[2][pairs[0]])
                rights.append(right_side[2][pairs[1]])
                distances.append(pairs[2])
    if not lefts:
        return NearPairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))
    return NearPairs(np.concatenate(lefts), np.concatenate(rights), np.concatenate(distances))


def _varying_bands(left: Hashes, right: Hashes) -> Rows:
    """Return the numbers of the bands in which not all hashes are the same, as they are in a hash's padding.

    At least one band if there is anything to compare; none if there is not.
    """
    if not len(left) or not len(right):
        return np.empty(0, dtype=np.int64)
    anywhere = np.bitwise_or.reduce(left, axis=0) | np.bitwise_or.reduce(right, axis=0)
    varying = anywhere ^ (np.bitwise_and.reduce(left, axis=0) & np.bitwise_and.reduce(right, axis=0))
    bands = np.arange(left.shape[1] * 64 // _BAND_BITS)
    parts = varying[bands // 4] >> (np.uint64(_BAND_BITS) * (bands % 4).astype(np.uint64))
    found = np.flatnonzero(parts.astype(np.uint16))
    return found if len(found) else bands[:1]


def _band_bounds(radius: int, num_bands: int) -> Rows:
    """Return per band how many bits of it may differ. A band that needs no look is left out; they are the last.

    With radius = q · num_bands + rest the first rest + 1 bands get q and the others q - 1: a pair beyond all of these
    differs in at least (rest + 1)(q + 1) + (num_bands - rest - 1) q = radius + 1 bits.
    """
    if not num_bands:
        return np.empty(0, dtype=np.int64)
    whole, rest = divmod(radius, num_bands)
    bounds = np.full(num_bands, whole, dtype=np.int64)
    bounds[rest + 1 :] -= 1
    return np.minimum(bounds[bounds >= 0], _BAND_BITS)


def _masks(bound: int) -> Rows:
    """Return all values of a band with at most `bound` bits set."""
    sizes = range(bound + 1)
    masks = [sum(1 << bit for bit in bits) for size in sizes for bits in combinations(range(_BAND_BITS), size)]
    return np.array(masks, dtype=np.int64)


def _sort_by_band(hashes: Hashes, band: int) -> tuple[Hashes, Rows, Rows]:
    """Return (hashes ordered by the value of a band, start of each value, row of each)."""
    values = (hashes[:, band // 4] >> np.uint64(_BAND_BITS * (band % 4))).astype(np.uint16)
    rows = np.argsort(values, kind="stable")
    starts = np.zeros(_NUM_VALUES + 1, dtype=np.int64)
    np.cumsum(np.bincount(values, minlength=_NUM_VALUES), out=starts[1:])
    return hashes[rows], starts, rows


def _join_values(
    left: tuple[Hashes, Rows, Rows],
    right: tuple[Hashes, Rows, Rows],
    masks: Rows,
    bands: tuple[Rows, Rows, int],
    radius: int,
    is_same: bool,
    values: tuple[int, int],
) -> tuple[Rows, Rows, npt.NDArray[np.int32]]:
    first, last = values
    capacity = _FIRST_CAPACITY
    while True:
        out = (np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity, np.int32))
        count = _compare(*left[:2], *right[:2], masks, *bands, radius, is_same, first, last, *out)
        if count <= capacity:
            return out[0][:count].copy(), out[1][:count].copy(), out[2][:count].copy()
        capacity = count


@intrinsic  # type: ignore[untyped-decorator]
def _popcount(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.ctpop", [ir.IntType(64)]), arguments)

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _compare(  # type: ignore[no-untyped-def]
    left, left_starts, right, right_starts, masks, bands, bounds, number, radius, is_same, first, last,
    out_left, out_right, out_distance,
):  # fmt: skip
    """Compare all hashes whose band bands[number] is in first … last - 1 with those whose band is within its bound.

    Returns the number of pairs found, which may be more than fit into the three outputs.
    """
    num_words = left.shape[1]
    capacity = len(out_left)
    band_mask = np.uint64(0xFFFF)
    count = 0
    for value in range(first, last):
        if left_starts[value] == left_starts[value + 1]:
            continue
        for mask in masks:
            other = value ^ mask
            if is_same and other < value:
                continue  # that pair of values is compared from the other side
            right_end = right_starts[other + 1]
            for i in range(left_starts[value], left_starts[value + 1]):
                j_start = i + 1 if is_same and other == value else right_starts[other]
                for j in range(j_start, right_end):
                    distance = np.uint64(0)
                    for word in range(num_words):
                        distance += _popcount(left[i, word] ^ right[j, word])
                        if distance > radius:
                            break
                    if distance > radius:
                        continue
                    is_found_before = False
                    for earlier in range(number):
                        band = bands[earlier]
                        differing = left[i, band >> 2] ^ right[j, band >> 2]
                        if _popcount((differing >> np.uint64(16 * (band & 3))) & band_mask) <= bounds[earlier]:
                            is_found_before = True
                            break
                    if not is_found_before:
                        if count < capacity:
                            out_left[count], out_right[count], out_distance[count] = i, j, distance
                        count += 1
    return count
