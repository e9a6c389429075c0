"""Find pictures that show parts of the same picture: crops to another aspect, with borders, with text laid over.

Two pictures that share at least two rare local features are looked at (`overlap`); they are a pair when enough of
their points agree on one scale and one shift and most of the overlap looks the same. A feature that more than
_MAX_PICTURES have (a logo, a text box, a plain edge) proposes nothing, so the work grows with the number of pictures
and not with its square: 4,000 to 16,000 pictures had 10 pairs to look at per picture, whatever their number.

Upright crops only: no turned or mirrored ones. Copies of the same aspect are what hashes find better and faster: give
one picture of each such group, since of more than _MAX_PICTURES copies none is found.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from sharding.duplicates.overlap import EVIDENCE, MIN_INLIERS, count_bits, measure_overlaps
from sharding.pictures.local_features import NO_POINT, FeatureColumns, read_features

_MAX_PICTURES = 32
_SHARED_FEATURES = 2
_SEED_BITS = 6  # by which the other half of a shared feature's descriptor may differ
_ENTRIES_PER_TASK = 1 << 20

_MIN_OF_SMALLER = 0.5
_MIN_OF_LARGER = 0.18
_MIN_INLIER_SHARE = 0.1
_MIN_COVERED = 0.4
# The more points agree, the more of the overlap may look different, as under a text box.
_RULES = ((MIN_INLIERS, 0.1, 0.0), (6, 0.2, 0.0), (12, 0.3, _MIN_COVERED))
"""At least so many inliers, at most so much disagreement, at least so much covered: one must hold."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CropPairs:
    """Pairs of pictures, sorted by (left, right); left < right.

    score: 0 to 1, higher is surer. share: overlap / area of the larger one; from 0.95 on the two show the same part,
    and may be a picture and its variant.
    """

    left: Rows
    right: Rows
    score: npt.NDArray[np.float32]
    share: npt.NDArray[np.float32]


def find_crops(features: Sequence[bytes]) -> CropPairs:
    """Return all pairs of pictures that are crops of one picture, as rows of `features`.

    features: from `local_features.extract_features`, empty where there are none. The overlap is at least half of the
    smaller picture and 18 % of the larger one (9:16 out of 16:9 is 32 %).

    Raises ValueError for features of another version.
    """
    columns = read_features(features)
    left, right = _candidates(columns)
    evidence = measure_overlaps(columns, left, right)
    values = dict(zip(EVIDENCE, evidence.T, strict=True))
    is_crop = (
        (values["of_smaller"] >= _MIN_OF_SMALLER)
        & (values["of_larger"] >= _MIN_OF_LARGER)
        & (values["inliers"] > _MIN_INLIER_SHARE * values["points"])
        & np.logical_or.reduce([
            (values["inliers"] >= inliers) & (values["disagreement"] <= disagreement) & (values["covered"] >= covered)
            for inliers, disagreement, covered in _RULES
        ])
    )  # fmt: skip
    score = values["inliers"] / (values["inliers"] + 2) * (1 - values["disagreement"])
    return CropPairs(left[is_crop], right[is_crop], score[is_crop], values["of_larger"][is_crop])


def _candidates(columns: FeatureColumns) -> tuple[Rows, Rows]:
    """Return the pairs of pictures that share features, sorted."""
    num_pictures = len(columns.level)
    descriptors = columns.descriptor.reshape(-1)
    rows = np.nonzero(columns.level.reshape(-1) != NO_POINT)[0].view(np.uint64)
    found = [np.empty(0, np.int64)]
    for half in range(2):
        # Sorting the half descriptor with the row below it puts a bucket's pictures in order. In place, for memory.
        entries = descriptors[rows]
        entries >>= np.uint64(32 * half)
        entries <<= np.uint64(32)
        entries |= rows
        entries.sort()
        found += _shared(entries, descriptors, columns.level.shape, half)
        del entries
    pairs = np.concatenate(found)
    del found
    pairs.sort()
    # A pair that stands here often enough, once.
    is_often = pairs[_SHARED_FEATURES - 1 :] == pairs[: len(pairs) - _SHARED_FEATURES + 1]
    pairs = np.unique(pairs[: len(is_often)][is_often])
    return pairs // num_pictures, pairs % num_pictures


def _shared(
    entries: npt.NDArray[np.uint64], descriptors: npt.NDArray[np.uint64], shape: tuple[int, ...], half: int
) -> list[Rows]:  # fmt: skip
    """Return left × pictures + right of every shared feature, in parts. shape: (pictures, points of each)."""
    starts = list(range(0, len(entries), _ENTRIES_PER_TASK))
    # A task begins where a bucket does.
    bounds = [int(np.searchsorted(entries, entries[start] >> np.uint64(32) << np.uint64(32))) for start in starts]

    def collide(first: int, last: int) -> Rows:
        capacity = 1 << 16
        while True:
            pairs = np.empty(capacity, np.int64)
            count = _collide(entries[first:last], descriptors, shape[0], shape[1], half, pairs)
            if count <= capacity:
                return pairs[:count].copy()
            capacity = count

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(collide, bounds, [*bounds[1:], len(entries)]))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _collide(entries, descriptors, num_pictures, num_points, half, pairs):  # type: ignore[no-untyped-def]
    """Write the pairs of pictures that share a feature of these entries; return their number, which may be larger."""
    low_half = np.uint64(0xFFFFFFFF)
    count = 0
    start = 0
    while start < len(entries):
        key = entries[start] >> np.uint64(32)
        end, in_bucket, previous = start, 0, -1
        while end < len(entries) and entries[end] >> np.uint64(32) == key:
            picture = np.int64(entries[end] & low_half) // num_points
            if picture != previous:
                in_bucket += 1
            previous = picture
            end += 1
        if 1 < in_bucket <= _MAX_PICTURES:
            for i in range(start, end):
                row = np.int64(entries[i] & low_half)
                for j in range(i + 1, end):
                    other = np.int64(entries[j] & low_half)
                    left, right = row // num_points, other // num_points
                    if left == right:
                        continue
                    differing = descriptors[row] ^ descriptors[other]
                    if half == 1 and differing & low_half == np.uint64(0):
                        continue  # shared by the other half, too, and counted there
                    if count_bits(differing) <= _SEED_BITS:
                        if count < len(pairs):
                            pairs[count] = left * num_pictures + right
                        count += 1
        start = end
    return count
