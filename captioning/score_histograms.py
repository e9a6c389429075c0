"""How a scorer's scores are spread, with the edges of a policy's tiers marked; counted in parts, drawn with Pillow.

Two passes over one column: the range, then the counts. Nothing is written here.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from captioning.config import CaptioningConfig
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part

MAX_BINS = 60
_INK, _SOFT, _LINE, _BAR, _EDGE = "#1d2330", "#5b6475", "#dfe3ea", "#4a7dd6", "#c2410c"


@dataclass(frozen=True)
class Edge:
    """A threshold of the policy and the word from there upwards."""

    value: float
    word: str


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of scores in steps: `counts[i]` is of low + i * step up to, not including, the next."""

    model: str
    low: float
    step: float
    counts: tuple[int, ...]
    num_missing: int
    """Rows without a score."""
    minimum: float
    mean: float
    maximum: float
    edges: tuple[Edge, ...]

    @property
    def num_scores(self) -> int:
        return sum(self.counts)


def score_histograms(
    config: CaptioningConfig, workspace: Workspace, *, policy: str, scorers: Sequence[str]
) -> list[ScoreHistogram]:
    """Return a histogram of each scorer that has annotations with scores."""
    found = (_histogram(workspace, model, policy_edges(config, policy, model)) for model in scorers)
    return [histogram for histogram in found if histogram is not None]


def policy_edges(config: CaptioningConfig, policy: str, model: str) -> tuple[Edge, ...]:
    """Return where the words of a policy change by this scorer, the lowest first."""
    rules = config.policies[policy]
    edges = [Edge(it, word) for table in rules.tiers.values() if table.model == model for it, word in table.steps]
    if rules.date.model == model:
        edges += [Edge(float(first), name) for name, (first, _) in config.periods.items()]
    return tuple(sorted(edges, key=lambda edge: edge.value))


def _histogram(workspace: Workspace, model: str, edges: tuple[Edge, ...]) -> ScoreHistogram | None:
    parts = list_parts(workspace.annotations(model))
    num_scores, num_missing, total, low, high, is_whole = 0, 0, 0.0, math.inf, -math.inf, True
    for part in parts:
        scores, missing = _scores(read_part(part, ["score", "status"]))
        num_missing += missing
        if len(scores):
            num_scores, total = num_scores + len(scores), total + float(scores.sum())
            low, high = min(low, float(scores.min())), max(high, float(scores.max()))
            is_whole = is_whole and bool((scores == np.floor(scores)).all())
    if not num_scores:
        return None
    start, step, num_bins = nice_bins(low, high, is_whole=is_whole)
    counts = np.zeros(num_bins, np.int64)
    for part in parts:
        scores, _ = _scores(read_part(part, ["score", "status"]))
        # Some score lies exactly on a border; a billionth of a step keeps it from falling below by rounding.
        places = np.clip(np.floor((scores - start) / step + 1e-6).astype(np.int64), 0, num_bins - 1)
        counts += np.bincount(places, minlength=num_bins)
    return ScoreHistogram(model, start, step, tuple(counts.tolist()), num_missing, low, total / num_scores, high, edges)


def _scores(table: pa.Table) -> tuple[npt.NDArray[np.float64], int]:
    column = table.filter(pc.equal(table.column("status"), "ok")).column("score")
    scores = np.asarray(pc.fill_null(column, float("nan")), dtype=np.float64)
    scores = scores[np.isfinite(scores)]
    return scores, len(table) - len(scores)


def nice_bins(low: float, high: float, *, is_whole: bool) -> tuple[float, float, int]:
    """Return (start, step, number) of at most MAX_BINS bins with round borders that hold low … high."""
    if low >= 0 and high <= 1 and not is_whole:
        return 0.0, 0.02, 50
    span = max(high - low, abs(high) * 1e-6, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / MAX_BINS))
    steps = [power * factor for factor in (1, 2, 5, 10, 20, 50)]
    if is_whole:
        steps = [step for step in [1.0, *steps] if step >= 1]
    for step in steps:
        start = math.floor(low / step) * step
        num_bins = math.floor((high - start) / step) + 1
        if num_bins <= MAX_BINS:
            return start, step, num_bins
    raise AssertionError(f"no bins for {low} … {high}")


# --- drawing ---


def draw_histogram(histogram: ScoreHistogram, *, width: int = 960, height: int = 460, scale: int = 2) -> bytes:
    """Return a PNG of width * scale x height * scale pixels: bars, axis, edges with their words."""
    image = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(image)
    fonts = {size: ImageFont.load_default(size * scale) for size in (11, 12, 16)}
    left, right, top, bottom = 70 * scale, (width - 90) * scale, 165 * scale, (height - 40) * scale
    most = max(histogram.counts)
    span = histogram.step * len(histogram.counts)

    def across(value: float) -> float:
        return left + (right - left) * (value - histogram.low) / span

    def up(count: float) -> float:
        return bottom - (bottom - top) * count / most

    missing = f", {histogram.num_missing:,} without" if histogram.num_missing else ""
    title = f"{histogram.model}: {histogram.num_scores:,} scores{missing}"
    draw.text((left, 12 * scale), title, _INK, fonts[16])
    for count in _ticks(0, most, 4):
        draw.line((left, up(count), right, up(count)), _LINE, scale)
        draw.text((left - 8 * scale, up(count)), f"{count:,.0f}", _SOFT, fonts[11], anchor="rm")
    for place, count in enumerate(histogram.counts):
        start = histogram.low + place * histogram.step
        if count:
            bar = (
                across(start) + scale / 2,
                min(up(count), bottom - scale),
                across(start + histogram.step) - scale / 2,
                bottom,
            )
            draw.rectangle(bar, _BAR)
    draw.line((left, bottom, right, bottom), _SOFT, scale)
    for value in _ticks(histogram.low, histogram.low + span, 10):
        draw.line((across(value), bottom, across(value), bottom + 4 * scale), _SOFT, scale)
        draw.text((across(value), bottom + 8 * scale), f"{value:.10g}", _SOFT, fonts[11], anchor="mt")
    last = -math.inf
    for edge in histogram.edges:
        x = across(edge.value)
        if not left <= x <= right:
            continue
        for y in range(top - 4 * scale, bottom, 6 * scale):
            draw.line((x, y, x, min(y + 3 * scale, bottom)), _EDGE, scale)
        last = max(x, last + 13 * scale)  # words of close edges stand beside each other
        _draw_upwards(image, f"{edge.word} {edge.value:.10g}", fonts[11], x=last, bottom=top - 8 * scale)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw_upwards(
    image: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, x: float, bottom: float
) -> None:
    _, _, width, height = (math.ceil(side) for side in font.getbbox(text))
    label = Image.new("L", (width, height), 0)
    ImageDraw.Draw(label).text((0, 0), text, 255, font)
    label = label.rotate(60, expand=True, resample=Image.Resampling.BICUBIC)
    image.paste(_EDGE, (round(x) - height // 2, round(bottom) - label.height), label)


def _ticks(low: float, high: float, num: int) -> list[float]:
    """Return about `num` round numbers from low to high."""
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]
