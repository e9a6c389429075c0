"""Choices in a caption's text: `{a|b|c}` becomes one of its alternatives, nested ones too. Pure, no torch.

The notation of kohya-ss sd-scripts: `{{` and `}}` are a brace itself, an alternative may be empty, `{a}` is `a`, and a
brace without its partner or with nothing inside stays as it is, for tags such as `:}`. What kohya lacks is nesting:
inside a choice another one may stand, and there `}}` ends both unless a `{{` waits for it. Two braces in a row at the
beginning are always the escape; a choice that opens with a choice needs a space: `{ {a|b}|c}`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

_MARKS = re.compile(r"\{\{|\}\}|[{}|]")
_BRACES = re.compile(r"\{\{|\}\}|[{}]")


class Segment(NamedTuple):
    """A stretch of text outside all choices, or one outermost choice."""

    raw: str
    """As written, with its braces."""
    text: str
    """As trained."""
    is_choice: bool


def expand(text: str, *, draw: Callable[[], float], nested: bool = True) -> list[Segment]:
    """Return the segments of `text` in order; joined, their `text` is what is trained.

    draw: gives the next number in [0, 1); asked once for each choice that is written, from left to right, an outer one
    before those inside it. nested: False takes an inner brace for text, as kohya does.
    """
    if "{" not in text and "}" not in text:
        return [Segment(text, text, False)]
    return _segments(text, 0, len(text), _choices(text, nested=nested)[0], draw)


def unmatched_braces(text: str) -> list[int]:
    """Return the positions of the braces that are no escape and belong to no choice."""
    return _choices(text, nested=True)[1]


@dataclass
class _Choice:
    start: int
    bars: list[int] = field(default_factory=list)
    end: int = -1
    num_escapes: int = 0
    """`{{` inside that wait for their `}}`."""


def _choices(text: str, *, nested: bool) -> tuple[dict[int, _Choice], list[int]]:
    """Return the choices by the position of their opening brace, and the positions of braces without a partner."""
    choices: dict[int, _Choice] = {}
    alone: list[int] = []
    open_: list[_Choice] = []

    def close(position: int) -> None:
        choice = open_.pop()
        choice.end = position
        if position == choice.start + 1:
            alone.extend((choice.start, position))  # {} is no choice
        else:
            choices[choice.start] = choice

    for found in _MARKS.finditer(text):
        mark, position = found.group(), found.start()
        if mark == "{" and (nested or not open_):
            open_.append(_Choice(position))
        elif mark == "}" and open_:
            close(position)
        elif mark == "}":
            alone.append(position)
        elif mark == "}}" and len(open_) > 1 and not open_[-1].num_escapes:
            close(position)
            close(position + 1)
        elif mark == "|" and open_:
            open_[-1].bars.append(position)
        elif mark in ("{{", "}}") and open_:
            open_[-1].num_escapes = max(0, open_[-1].num_escapes + (1 if mark == "{{" else -1))
    return choices, sorted([*alone, *(choice.start for choice in open_)])


def _segments(text: str, start: int, end: int, choices: dict[int, _Choice], draw: Callable[[], float]) -> list[Segment]:
    segments: list[Segment] = []
    written: list[str] = []
    segment_start = position = start
    while found := _BRACES.search(text, position, end):
        written.append(text[position : found.start()])
        choice = choices.get(found.start())
        if choice is None:
            written.append(found.group()[0])
            position = found.end()
            continue
        segments.append(Segment(text[segment_start : choice.start], "".join(written), False))
        segments.append(Segment(text[choice.start : choice.end + 1], _picked(text, choice, choices, draw), True))
        written = []
        segment_start = position = choice.end + 1
    segments.append(Segment(text[segment_start:end], "".join([*written, text[position:end]]), False))
    return segments


def _picked(text: str, choice: _Choice, choices: dict[int, _Choice], draw: Callable[[], float]) -> str:
    edges = [choice.start, *choice.bars, choice.end]
    number = int(draw() * (len(edges) - 1))
    inside = _segments(text, edges[number] + 1, edges[number + 1], choices, draw)
    return "".join(segment.text for segment in inside)
