"""Frames of one pan → one picture: the wiki's "stitches", with a gradient where frames meet.

Finds frames of one size that show the same still picture moved: by phase correlation of their edges, refined level by
level, and accepted only where the overlap really is the same. Frames in which something large moves are left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Plane = npt.NDArray[np.floating]

NEIGHBOURS = 8
"""A frame is compared with this many behind it, by name: frames of a pan stand together."""

_SIDE = 160  # pixels of the longer side at which frames are first compared
_MIN_OVERLAP, _MAX_OVERLAP = 0.15, 0.97  # share of a frame; above, it is the same frame again
_MIN_ALIKE = 0.93  # correlation of the overlap
_MAX_APART = 0.04  # mean difference of luma in the overlap
_MIN_DETAIL = 0.02  # standard deviation of luma: a flat overlap proves nothing
_PEAKS = 4


@dataclass(frozen=True)
class Pan:
    """Frames of one still picture. places: (left, top) of each in pixels of the result, all at least 0."""

    frames: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    width: int
    height: int


def find_pans(frames: Sequence[Image.Image]) -> list[Pan]:
    """Return the pans among pictures that stand in the order of their names; frames of none are in no result."""
    sizes, small = [], []
    for number in range(len(frames)):  # each is asked for once here: they may be decoded when they are asked for
        frame = frames[number]
        sizes.append(frame.size)
        small.append(_luma(_reduced(frame)))
    shifts: dict[tuple[int, int], tuple[int, int]] = {}
    for first in range(len(frames)):
        for second in range(first + 1, min(first + 1 + NEIGHBOURS, len(frames))):
            at = _coarse_shift(small[first], small[second]) if sizes[first] == sizes[second] else None
            if at is not None:
                scale = sizes[first][0] / small[first].shape[1]
                shifts[first, second] = _refined(frames[first], frames[second], at, scale=scale)
    return _joined(shifts, sizes)


def stitch(frames: Sequence[Image.Image], pan: Pan) -> Image.Image:
    """Lay the frames of a pan over each other; each fades out towards its own border where another one lies."""
    total = np.zeros((pan.height, pan.width, 3), np.float32)
    weights = np.zeros((pan.height, pan.width, 1), np.float32)
    for number, (left, top) in zip(pan.frames, pan.places, strict=True):
        frame = frames[number]
        fade = np.minimum(_ramp(frame.height)[:, None], _ramp(frame.width)[None])[..., None]
        place = np.s_[top : top + frame.height, left : left + frame.width]
        total[place] += np.asarray(frame, np.float32) * fade
        weights[place] += fade
    holes = weights[..., 0] == 0
    if holes.any():  # a slanting pan leaves corners: they become the colour that the rest has on the average
        total[holes] = total[~holes].sum(axis=0) / weights[~holes].sum()
        weights[holes] = 1
    return Image.fromarray((total / weights).round().clip(0, 255).astype(np.uint8))


def _ramp(length: int) -> Plane:
    return np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)


def _reduced(frame: Image.Image) -> Image.Image:
    scale = _SIDE / max(frame.size)
    if scale >= 1:
        return frame
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    return frame.resize(size, Image.Resampling.BOX)


def _luma(frame: Image.Image) -> Plane:
    return np.asarray(frame.convert("L"), np.float32) / 255


def _coarse_shift(one: Plane, two: Plane) -> tuple[int, int] | None:
    """Return where the second frame lies, (right, down) of the first one, in small pixels; None when it shows else."""
    candidates = [at for at in _candidates(one, two) if _is_same(one, two, at)]
    return min(candidates, key=lambda at: _difference(one, two, at)) if candidates else None


def _candidates(one: Plane, two: Plane) -> list[tuple[int, int]]:
    """Return the strongest peaks of the phase correlation, as (right, down).

    Source: Kuglin and Hines, "The phase correlation image alignment method", 1975. Edges instead of luma, and zeros
    around: frames that overlap by half are no circle.
    """
    height, width = one.shape
    spectra = [np.fft.rfft2(_edges(plane), s=(2 * height, 2 * width)) for plane in (one, two)]
    cross = spectra[0] * np.conj(spectra[1])
    power = np.fft.irfft2(cross / (np.abs(cross) + 1e-6 * np.abs(cross).max() + 1e-12), s=(2 * height, 2 * width))
    found = []
    for flat in np.argsort(power, axis=None)[: -_PEAKS - 1 : -1]:
        down, right = np.unravel_index(flat, power.shape)
        found.append((int(right) - 2 * width * (right >= width), int(down) - 2 * height * (down >= height)))
    return found


def _edges(luma: Plane) -> Plane:
    edges = np.abs(np.diff(luma, axis=0))[:, :-1] + np.abs(np.diff(luma, axis=1))[:-1]
    return np.asarray(edges - edges.mean())


def _overlap(one: Plane, two: Plane, at: tuple[int, int]) -> tuple[Plane, Plane]:
    """Return what both frames show, as each of them has it."""
    right, down = at
    height, width = one.shape
    rows, columns = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
    rows_two, columns_two = slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right))
    return one[rows, columns], two[rows_two, columns_two]


def _difference(one: Plane, two: Plane, at: tuple[int, int]) -> float:
    mine, other = _overlap(one, two, at)
    return float(np.abs(mine - other).mean()) if mine.size else 1.0


def _is_same(one: Plane, two: Plane, at: tuple[int, int]) -> bool:
    mine, other = _overlap(one, two, at)
    if not _MIN_OVERLAP <= mine.size / one.size <= _MAX_OVERLAP or min(mine.std(), other.std()) < _MIN_DETAIL:
        return False
    alike = float(np.corrcoef(mine.ravel(), other.ravel())[0, 1])
    return alike >= _MIN_ALIKE and _difference(one, two, at) <= _MAX_APART


def _refined(one: Image.Image, two: Image.Image, at: tuple[int, int], *, scale: float) -> tuple[int, int]:
    """Follow a shift up to full size, doubling the frames each time and looking two pixels around."""
    right, down = float(at[0]), float(at[1])
    while scale > 1:
        step = min(2.0, scale)
        scale /= step
        right, down = right * step, down * step
        size = (round(one.width / scale), round(one.height / scale))
        first, second = (
            _luma(frame.resize(size, Image.Resampling.BOX) if scale > 1 else frame) for frame in (one, two)
        )
        around = [(round(right) + x, round(down) + y) for x in range(-2, 3) for y in range(-2, 3)]
        right, down = min(around, key=lambda place: _difference(first, second, place))
    return round(right), round(down)


def _joined(shifts: dict[tuple[int, int], tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> list[Pan]:
    """Chain pairs into pans, each frame placed by the first pair that reaches it."""
    near: dict[int, dict[int, tuple[int, int]]] = {}
    for (first, second), (right, down) in shifts.items():
        near.setdefault(first, {})[second] = (right, down)
        near.setdefault(second, {})[first] = (-right, -down)
    pans, seen = [], set[int]()
    for start in sorted(near):
        if start in seen:
            continue
        places = {start: (0, 0)}
        waiting = [start]
        while waiting:
            here = waiting.pop(0)
            for other, (right, down) in sorted(near[here].items()):
                if other not in places:
                    places[other] = (places[here][0] + right, places[here][1] + down)
                    waiting.append(other)
        seen |= set(places)
        pans.append(_pan(places, sizes[start]))
    return pans


def _pan(places: dict[int, tuple[int, int]], size: tuple[int, int]) -> Pan:
    left, top = (min(place[axis] for place in places.values()) for axis in (0, 1))
    right, bottom = (max(place[axis] for place in places.values()) + size[axis] for axis in (0, 1))
    frames = tuple(sorted(places))
    return Pan(
        frames, tuple((places[one][0] - left, places[one][1] - top) for one in frames), right - left, bottom - top
    )
