"""How two pictures lie on each other: the scale and shift on which their features agree, and what they show there.

Two pairs of matching points propose a scale and a shift; the proposal that most points follow is taken. Over the area
where the pictures then overlap, 10 × 10 places of their thumbnails are compared, after one is brightened or darkened
to fit the other. Coordinates are working pixels of `local_features`, of which every picture has the same number.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from numba import njit

from sharding.pictures.local_features import NO_POINT, SCALE_STEP, STEPS_PER_LEVEL, FeatureColumns

EVIDENCE = ("inliers", "points", "of_smaller", "of_larger", "disagreement", "covered")
"""inliers: points that follow; points: that lie in the overlap, in the picture with fewer; of_smaller, of_larger:
overlap / area of each picture; disagreement: share of places that look different; covered: share of the overlap that
the box around the inliers covers."""

MIN_INLIERS = 4
"""With fewer there is no evidence: any two pictures have some points that agree by accident."""

_MATCH_BITS = 12
_MAX_MATCHES = 96
_ENOUGH_INLIERS = 16  # no better proposal is looked for
_MIN_DISTANCE = 20.0  # working pixels between two points that propose
_MAX_SCALE = 5.0
_SCALE_TOLERANCE = 1.39  # between the proposed scale and that of each point; a level of the pyramid is 1.26
_GRID = 10
_MIN_GREY, _MAX_GREY = 2.0, 8.0
"""Grey levels by which a place may differ: half the contrast, within these, and what a shift by half a pixel adds."""
_MAX_CHROMA = 14.0
_PAIRS_PER_TASK = 2_000

_LEVEL_SCALES = SCALE_STEP ** -(np.arange(256) / STEPS_PER_LEVEL)


def measure_overlaps(
    features: FeatureColumns, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return (P, 6): the EVIDENCE for each pair of pictures (left[p], right[p]); zeros where nothing agrees."""
    evidence = np.zeros((len(left), len(EVIDENCE)), np.float32)

    def measure(start: int) -> None:
        here = slice(start, start + _PAIRS_PER_TASK)
        _measure_pairs(
            left[here], right[here], features.size, features.position, features.level, features.descriptor,
            features.luma, features.chroma, _LEVEL_SCALES, evidence[here],
        )  # fmt: skip

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        done: Iterator[None] = pool.map(measure, range(0, len(left), _PAIRS_PER_TASK))
        list(done)  # raises what a task raised
    return evidence


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _measure_pairs(  # type: ignore[no-untyped-def]
    left, right, sizes, positions, levels, descriptors, luma, chroma, level_scales, evidence
):
    num_points = levels.shape[1]
    left_points, right_points = np.empty((num_points, 3)), np.empty((num_points, 3))
    matches = np.empty((_MAX_MATCHES, 2), np.int64)
    for pair in range(len(left)):
        a, b = left[pair], right[pair]
        size_a, size_b = sizes[a].astype(np.float64), sizes[b].astype(np.float64)
        num_left = _place_points(positions[a], levels[a], size_a, level_scales, left_points)
        num_right = _place_points(positions[b], levels[b], size_b, level_scales, right_points)
        num_matches = _match(descriptors[a, :num_left], descriptors[b, :num_right], matches)
        scale, x, y = _best_proposal(left_points, right_points, matches[:num_matches])
        if scale == 0.0:
            continue
        inliers, scale, x, y, box = _refine(left_points, right_points, matches[:num_matches], scale, x, y)
        if inliers < MIN_INLIERS:
            continue
        x0, y0 = max(0.0, x), max(0.0, y)
        x1, y1 = min(size_a[0], x + scale * size_b[0]), min(size_a[1], y + scale * size_b[1])
        if x1 - x0 < 8.0 or y1 - y0 < 8.0:
            continue
        area = (x1 - x0) * (y1 - y0)
        area_a, area_b = size_a[0] * size_a[1], scale * scale * size_b[0] * size_b[1]
        evidence[pair, 0] = inliers
        evidence[pair, 1] = min(
            _count_inside(left_points[:num_left], 1.0, 0.0, 0.0, x0, y0, x1, y1),
            _count_inside(right_points[:num_right], scale, x, y, x0, y0, x1, y1),
        )
        evidence[pair, 2] = area / min(area_a, area_b)
        evidence[pair, 3] = area / max(area_a, area_b)
        evidence[pair, 4] = _disagreement(
            luma[a], luma[b], chroma[a], chroma[b], size_a, size_b, scale, x, y, x0, y0, x1, y1
        )
        evidence[pair, 5] = box / area


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _place_points(positions, levels, size, level_scales, points):  # type: ignore[no-untyped-def]
    """Fill points with x, y, scale; return how many there are."""
    count = 0
    while count < len(levels) and levels[count] != NO_POINT:
        points[count, 0] = (positions[count, 0] + 0.5) / 256.0 * size[0]
        points[count, 1] = (positions[count, 1] + 0.5) / 256.0 * size[1]
        points[count, 2] = level_scales[levels[count]]
        count += 1
    return count


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _match(left, right, matches):  # type: ignore[no-untyped-def]
    """Fill matches with the pairs of points whose descriptors are nearest, as many as fit; return how many."""
    counts = np.zeros(_MATCH_BITS + 1, np.int64)
    distances = np.empty((len(left), len(right)), np.uint8)
    for i in range(len(left)):
        for j in range(len(right)):
            distances[i, j] = count_bits(left[i] ^ right[j])
            if distances[i, j] <= _MATCH_BITS:
                counts[distances[i, j]] += 1
    limit, total = -1, 0
    while limit < _MATCH_BITS and total + counts[limit + 1] <= len(matches):
        limit += 1
        total += counts[limit]
    count = 0
    for i in range(len(left)):
        for j in range(len(right)):
            if distances[i, j] <= limit:
                matches[count, 0], matches[count, 1] = i, j
                count += 1
    return count


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _best_proposal(left, right, matches):  # type: ignore[no-untyped-def]
    """Return (scale, x, y), right → left, that most matches follow; scale 0 if no two of them propose any."""
    best, best_scale, best_x, best_y = 1, 0.0, 0.0, 0.0
    used = np.empty((2, len(left)), np.bool_)
    for first in range(len(matches)):
        i, j = matches[first, 0], matches[first, 1]
        for second in range(first + 1, len(matches)):
            k, m = matches[second, 0], matches[second, 1]
            left_x, left_y = left[k, 0] - left[i, 0], left[k, 1] - left[i, 1]
            right_x, right_y = right[m, 0] - right[j, 0], right[m, 1] - right[j, 1]
            left_square, right_square = left_x**2 + left_y**2, right_x**2 + right_y**2
            product = left_x * right_x + left_y * right_y
            if min(left_square, right_square) < _MIN_DISTANCE**2 or product <= 0.0:
                continue
            if product * product < 0.985 * left_square * right_square:  # directions differ by more than 7 degrees
                continue
            scale = product / right_square
            if not 1.0 / _MAX_SCALE <= scale <= _MAX_SCALE:
                continue
            if not (_scales_agree(left[i, 2], scale * right[j, 2]) and _scales_agree(left[k, 2], scale * right[m, 2])):
                continue
            x = (left[i, 0] + left[k, 0] - scale * (right[j, 0] + right[m, 0])) / 2.0
            y = (left[i, 1] + left[k, 1] - scale * (right[j, 1] + right[m, 1])) / 2.0
            used[:] = False
            count = 0
            for match in range(len(matches)):
                if _follows(left, right, matches[match, 0], matches[match, 1], scale, x, y, used):
                    count += 1
            if count > best:
                best, best_scale, best_x, best_y = count, scale, x, y
            if best >= _ENOUGH_INLIERS:
                return best_scale, best_x, best_y
    return best_scale, best_x, best_y


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _scales_agree(left, right):  # type: ignore[no-untyped-def]
    return right <= _SCALE_TOLERANCE * left and left <= _SCALE_TOLERANCE * right


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _follows(left, right, i, j, scale, x, y, used):  # type: ignore[no-untyped-def]
    """Tell whether points i and j follow scale and shift, each point once; marks them as used."""
    if used[0, i] or used[1, j] or not _scales_agree(left[i, 2], scale * right[j, 2]):
        return False
    # Positions are known to 256ths of a side, and to a part of the point's own size.
    tolerance = 4.0 + 0.5 * min(left[i, 2], scale * right[j, 2]) + 1.5 * max(1.0, scale)
    if abs(scale * right[j, 0] + x - left[i, 0]) > tolerance or abs(scale * right[j, 1] + y - left[i, 1]) > tolerance:
        return False
    used[0, i] = used[1, j] = True
    return True


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _refine(left, right, matches, scale, x, y):  # type: ignore[no-untyped-def]
    """Return (inliers, scale, x, y, area of the box around them) after two rounds of least squares over inliers."""
    used = np.empty((2, len(left)), np.bool_)
    is_inlier = np.empty(len(matches), np.bool_)
    count, box = 0, 0.0
    for _ in range(2):
        used[:] = False
        count = 0
        left_mean, right_mean = np.zeros(2), np.zeros(2)
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        for match in range(len(matches)):
            is_inlier[match] = _follows(left, right, matches[match, 0], matches[match, 1], scale, x, y, used)
            if is_inlier[match]:
                count += 1
                for axis in range(2):
                    here = left[matches[match, 0], axis]
                    left_mean[axis] += here
                    right_mean[axis] += right[matches[match, 1], axis]
                    low[axis], high[axis] = min(low[axis], here), max(high[axis], here)
        left_mean /= count
        right_mean /= count
        box = (high[0] - low[0]) * (high[1] - low[1])
        product, square = 0.0, 1e-9
        for match in range(len(matches)):
            if is_inlier[match]:
                for axis in range(2):
                    away = right[matches[match, 1], axis] - right_mean[axis]
                    product += away * (left[matches[match, 0], axis] - left_mean[axis])
                    square += away * away
        if product * _MAX_SCALE > square:
            scale = product / square
            x, y = left_mean[0] - scale * right_mean[0], left_mean[1] - scale * right_mean[1]
    return count, scale, x, y, box


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _count_inside(points, scale, x, y, x0, y0, x1, y1):  # type: ignore[no-untyped-def]
    count = 0
    for point in range(len(points)):
        at_x, at_y = scale * points[point, 0] + x, scale * points[point, 1] + y
        if x0 <= at_x <= x1 and y0 <= at_y <= y1:
            count += 1
    return count


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _disagreement(  # type: ignore[no-untyped-def]
    luma_a, luma_b, chroma_a, chroma_b, size_a, size_b, scale, x, y, x0, y0, x1, y1
):
    """Return the share of the overlap's places that look different, under the brightness that suits most places."""
    num_places = _GRID * _GRID
    grey_a, grey_b, allowed = np.empty(num_places), np.empty(num_places), np.empty(num_places)
    is_other_colour = np.empty(num_places, np.bool_)
    side = luma_a.shape[0]
    # The coarser of the two thumbnails decides over how much a place is averaged.
    step_x, step_y = max(size_a[0], scale * size_b[0]) / side / 3.0, max(size_a[1], scale * size_b[1]) / side / 3.0
    for place in range(num_places):
        middle_x = x0 + (place % _GRID + 0.5) / _GRID * (x1 - x0)
        middle_y = y0 + (place // _GRID + 0.5) / _GRID * (y1 - y0)
        sums = np.zeros(4)
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        for sample in range(9):
            at_x = min(max(middle_x + (sample % 3 - 1) * step_x, x0), x1)
            at_y = min(max(middle_y + (sample // 3 - 1) * step_y, y0), y1)
            in_a_x, in_a_y = at_x / size_a[0], at_y / size_a[1]
            in_b_x, in_b_y = (at_x - x) / scale / size_b[0], (at_y - y) / scale / size_b[1]
            greys = (_sample(luma_a, in_a_x, in_a_y), _sample(luma_b, in_b_x, in_b_y))
            for picture in range(2):
                sums[picture] += greys[picture] / 9.0
                low[picture], high[picture] = min(low[picture], greys[picture]), max(high[picture], greys[picture])
                sums[2 + picture] += (
                    _sample(chroma_a[picture], in_a_x, in_a_y) - _sample(chroma_b[picture], in_b_x, in_b_y)
                ) / 9.0
        grey_a[place], grey_b[place] = sums[0], sums[1]
        allowed[place] = max(high[0] - low[0], high[1] - low[1]) / 2.0
        is_other_colour[place] = max(abs(sums[2]), abs(sums[3])) > _MAX_CHROMA
    # Of dark or hazy pictures all places would look alike.
    allowed += min(max(min(grey_a.std(), grey_b.std()) / 2.0, _MIN_GREY), _MAX_GREY)
    fewest = num_places
    for start in range(2):  # from equal brightness, and from what fits all places
        gain, offset = 1.0, 0.0
        is_used = np.ones(num_places, np.bool_)
        for round_ in range(4):
            if start == 0 or round_ > 0:
                is_used = np.abs(grey_a - gain * grey_b - offset) <= allowed
                fewest = min(fewest, int((~is_used | is_other_colour).sum()))
            count = is_used.sum()
            if count < _GRID:
                break
            mean_a, mean_b = (grey_a * is_used).sum() / count, (grey_b * is_used).sum() / count
            away = (grey_b - mean_b) * is_used
            gain = ((away * grey_a).sum() + count) / ((away * away).sum() + count)
            gain = min(max(gain, 0.6), 1.67)
            offset = mean_a - gain * mean_b
    return fewest / num_places


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sample(plane, x, y):  # type: ignore[no-untyped-def]
    """Return the interpolated value at x, y, each 0 to 1 from edge to edge."""
    side = plane.shape[0]
    column, row = min(max(x * side - 0.5, 0.0), side - 1.001), min(max(y * side - 0.5, 0.0), side - 1.001)
    i, j = int(column), int(row)
    u, v = column - i, row - j
    upper = plane[j, i] * (1.0 - u) + plane[j, i + 1] * u
    return upper * (1.0 - v) + (plane[j + 1, i] * (1.0 - u) + plane[j + 1, i + 1] * u) * v


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def count_bits(word):  # type: ignore[no-untyped-def]
    """Return the number of ones of a uint64, inside numba code."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)
