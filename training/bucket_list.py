"""Which resolution buckets a run has: their settings, and the fixed lists of the families that have one.

Pure functions, no torch. How a picture gets into one of them is in `buckets`.

Four families:
    no_upscale  no list, the bucket follows the image: not enlarged, fitted into an area, each side floored to the step
    area        sizes of about equal area, every width in steps; the nearest ratio is taken, small images are enlarged
    ratios      a fixed list of aspect ratios at one area; ratios = (1.0,) is the plain square
    long_side   the longer side is always the same, the shorter one goes in steps: the wiki's table for anime DreamBooth
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

STABLE_CASCADE_RATIOS = (1 / 1, 1 / 2, 1 / 3, 2 / 3, 3 / 4, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1 / 6, 5 / 6, 9 / 16)
"""Aspect ratios of the official Stable Cascade training configs; each stands for its inverse, too."""

Family = Literal["no_upscale", "area", "ratios", "long_side"]
_AREA_MIN_SIDE, _AREA_MAX_SIDE = 256, 4096  # what the seed's command asks for
_EXACT = 1e-9  # the square of an exact side must not be floored a step down by rounding


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size shared by all images of a micro-batch, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class BucketSettings:
    """Which buckets there are. Raises ValueError when the numbers cannot go together, or leave no bucket."""

    family: Family = "no_upscale"
    resolution_area: int = 1024 * 1024
    """Largest width × height of a bucket, in pixels as the encoder sees them."""
    long_side: int | None = None
    """Longer side of all buckets of family `long_side`, floored to the step; default: of a square of that area."""
    step: int = 64
    """Sides are multiples of this. The official Stable Cascade buckets have 32."""
    min_side: int | None = None
    """Shortest side of a bucket. Default: 256 for `area`, half the long side for `long_side`, else no bound.
    With `no_upscale` an image whose bucket would be shorter has none (kohya ignores both bounds there)."""
    max_side: int | None = None
    """Longest side of a bucket. Default: 4096 for `area`, else no bound. With `no_upscale` an image is made smaller
    until it fits."""
    ratios: tuple[float, ...] = STABLE_CASCADE_RATIOS
    """Aspect ratios, inverses implied; family `ratios` only."""
    source_scale: float = 1.0
    """Pictures are taken as this much smaller before a bucket is chosen: Stable Cascade's encoder sees 3/4 of a
    picture's sides. Above 1 is refused: it would invent pixels."""

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(f"buckets.family: must be one of {', '.join(get_args(Family))}, got {self.family!r}")
        if not 0 < self.source_scale <= 1:
            raise ValueError(f"buckets.source_scale: must be above 0 and at most 1, got {self.source_scale}")
        if self.step < 1 or self.resolution_area < self.step**2:
            raise ValueError(
                f"buckets.resolution_area ({self.resolution_area:,}) must hold at least one step × step"
                f" (buckets.step = {self.step})"
            )
        if self.family == "ratios" and not (self.ratios and all(0 < r < math.inf for r in self.ratios)):
            raise ValueError(f"buckets.ratios: must be positive numbers, got {self.ratios}")
        shortest, longest = self.bounds
        side = self.side
        if self.min_side is not None and not self.step <= shortest <= side:
            raise ValueError(
                f"buckets.min_side ({shortest}) must lie between buckets.step ({self.step}) and {self._side_name}"
                f" ({side})"
            )
        if self.max_side is not None and longest < side:
            raise ValueError(f"buckets.max_side ({int(longest)}) must be at least {self._side_name} ({side})")
        if self.family != "no_upscale" and not _list(self):
            raise ValueError(
                f"buckets: no size of family {self.family!r} has sides of {shortest} to {longest:.0f} pixels;"
                " check buckets.min_side, buckets.max_side and buckets.step"
            )

    @property
    def side(self) -> int:
        """The long side of family `long_side`, else the side of a square of the area; not floored to the step."""
        given = self.long_side if self.family == "long_side" else None
        return math.isqrt(self.resolution_area) if given is None else given

    @property
    def bounds(self) -> tuple[int, float]:
        """Shortest and longest side of a bucket, with the family's defaults: (0, inf) is no bound."""
        shortest = {"area": min(_AREA_MIN_SIDE, self.side), "long_side": self.side // 2}.get(self.family, 0)
        longest = {"area": max(_AREA_MAX_SIDE, self.side)}.get(self.family, math.inf)
        return (
            shortest if self.min_side is None else self.min_side,
            longest if self.max_side is None else self.max_side,
        )

    @property
    def _side_name(self) -> str:
        return "the long side" if self.family == "long_side" else "the side of a square of buckets.resolution_area"


@lru_cache(maxsize=16)
def listed_buckets(settings: BucketSettings) -> tuple[Bucket, ...]:
    """Return the fixed buckets of a family, sorted; () for `no_upscale`, which has no list.

    `area`: for every width from min_side to max_side in steps the largest height that fits the area, both ways
    round, and the square (the rule of kohya-ss sd-scripts). `ratios`: sides sqrt(area · ratio) and
    sqrt(area / ratio), floored to the step (the rule of Stability's Bucketeer, whose factor is 32). `long_side`: the
    long side with every shorter side from min_side up to it; with a step of an eighth of it these are the ratios 1:1,
    7:8, 3:4, 5:8 and 1:2 of the table "Valid Resolution" in Anime4000's DreamBooth wiki.
    """
    return () if settings.family == "no_upscale" else tuple(sorted(_list(settings)))


def _list(settings: BucketSettings) -> set[Bucket]:
    step, area = settings.step, settings.resolution_area
    shortest, longest = settings.bounds
    if settings.family == "area":
        square = math.isqrt(area) // step * step
        sides = [(square, square)]
        for width in range(shortest, int(longest) + 1, step):
            sides.append((width, min(int(longest), area // width) // step * step))
    elif settings.family == "ratios":
        sides = [
            (int(math.sqrt(area * ratio) / step + _EXACT) * step, int(math.sqrt(area / ratio) / step + _EXACT) * step)
            for ratio in settings.ratios
        ]
    else:
        long = settings.side // step * step
        first = -(-max(shortest, 1) // step) * step
        sides = [(long, short) for short in range(first, long + 1, step)]
    fitting = {(a, b) for a, b in sides if max(shortest, 1) <= min(a, b) and max(a, b) <= longest}
    return {Bucket(*pair) for a, b in fitting for pair in ((a, b), (b, a))}
