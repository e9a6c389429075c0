"""Draw a histogram of scores as a PNG with Pillow: bars, axes, and the edges of tiers with their words."""

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from captioning.score_histograms import ScoreHistogram
from captioning.text_table import number_text, short_word

_INK, _SOFT, _LINE, _BAR, _EDGE = "#1d2330", "#5b6475", "#dfe3ea", "#4a7dd6", "#c2410c"
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_LEFT, _RIGHT, _TITLE, _BARS, _AXIS = 64, 24, 40, 220, 34
"""Pixels: margins at the left and right, the title above, the bars, the numbers below."""
_ANGLE = 60
_BETWEEN_LABELS = 16


def draw_histogram(histogram: ScoreHistogram, *, width: int = 720, scale: int = 2) -> bytes:
    """Return a PNG of width * scale pixels; its height is what the words of the edges need."""
    return _Drawing(histogram, width, scale).png()


class _Drawing:
    """Lengths are pixels before scaling, except in what is handed to Pillow."""

    def __init__(self, histogram: ScoreHistogram, width: int, scale: int) -> None:
        self._histogram, self._scale = histogram, scale
        self._small, self._large = (ImageFont.load_default(size * scale) for size in (12, 16))
        span = histogram.step * len(histogram.counts)
        self._high = histogram.low + span
        self._edges = [edge for edge in histogram.edges if histogram.low <= edge.value <= self._high]
        self._labels = [f"{short_word(edge.word, most=28)} {number_text(edge.value)}" for edge in self._edges]
        longest = max((self._small.getlength(label) / scale for label in self._labels), default=0.0)
        right = _RIGHT + longest * math.cos(math.radians(_ANGLE))
        self._top = _TITLE + math.ceil(longest * math.sin(math.radians(_ANGLE))) + (24 if longest else 0)
        self._bottom = self._top + _BARS
        self._left, self._right = float(_LEFT), max(width - right, width / 2)
        self._image = Image.new("RGB", (width * scale, (self._bottom + _AXIS) * scale), "white")
        self._draw = ImageDraw.Draw(self._image)

    def png(self) -> bytes:
        it = self._histogram
        missing = f", {it.num_missing:,} without" if it.num_missing else ""
        self._text(_LEFT, 20, f"{it.model}: {it.num_scores:,} scores{missing}", "lm", _INK, self._large)
        self._draw_bars()
        self._draw_edges()
        buffer = io.BytesIO()
        self._image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def _across(self, value: float) -> float:
        return self._left + (self._right - self._left) * (value - self._histogram.low) / (
            self._high - self._histogram.low
        )

    def _draw_bars(self) -> None:
        it, most = self._histogram, max(self._histogram.counts)
        for count in ticks(0, most, 4, least=1):
            y = self._bottom - _BARS * count / most
            self._line(self._left, y, self._right, y, _LINE)
            self._text(self._left - 8, y, f"{count:,.10g}", "rm")
        for place, count in enumerate(it.counts):
            start, end = (self._across(it.low + number * it.step) for number in (place, place + 1))
            if count:
                top = min(self._bottom - _BARS * count / most, self._bottom - 1)
                box = (start + 0.5, top, end - 0.5, self._bottom)
                self._draw.rectangle([side * self._scale for side in box], _BAR)
        self._line(self._left, self._bottom, self._right, self._bottom, _SOFT)
        for value in ticks(it.low, self._high, 8, least=it.step):
            self._line(self._across(value), self._bottom, self._across(value), self._bottom + 4, _SOFT)
            self._text(self._across(value), self._bottom + 8, number_text(value), "mt")

    def _draw_edges(self) -> None:
        places = [self._across(edge.value) for edge in self._edges]
        spread = spread_out(places, apart=_BETWEEN_LABELS, high=self._right)
        for x, label_x, label in zip(places, spread, self._labels, strict=True):
            for y in range(self._top, self._bottom, 6):
                self._line(x, y, x, min(y + 3, self._bottom), _EDGE)
            self._line(x, self._top, label_x, self._top - 10, _EDGE)
            self._text_upwards(label_x, self._top - 12, label)

    def _line(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        self._draw.line([side * self._scale for side in (x, y, to_x, to_y)], colour, self._scale)

    def _text(self, x: float, y: float, text: str, anchor: str, colour: str = _SOFT, font: _Font | None = None) -> None:
        self._draw.text((x * self._scale, y * self._scale), text, colour, font or self._small, anchor=anchor)

    def _text_upwards(self, x: float, y: float, text: str) -> None:
        _, _, width, height = (math.ceil(side) for side in self._small.getbbox(text))
        label = Image.new("L", (width, height), 0)
        ImageDraw.Draw(label).text((0, 0), text, 255, self._small)
        label = label.rotate(_ANGLE, expand=True, resample=Image.Resampling.BICUBIC)
        corner = (round(x * self._scale) - height // 2, round(y * self._scale) - label.height + height // 3)
        self._image.paste(_EDGE, corner, label)


def spread_out(places: Sequence[float], *, apart: float, high: float) -> list[float]:
    """Return sorted places moved as little as needed to lie `apart`, none above `high` if there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + apart) if moved else place)
    limit = high
    for number in range(len(moved) - 1, -1, -1):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - apart
    return moved


def ticks(low: float, high: float, num: int, *, least: float) -> list[float]:
    """Return about `num` round numbers from low to high, at least `least` apart."""
    raw = max((high - low) / num, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]
