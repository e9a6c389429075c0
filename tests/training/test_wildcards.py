import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.wildcards import expand, unmatched_braces

PIECES = st.sampled_from(["a", "b ", ", ", "|", "{", "}", "{{", "}}", "{a|b}", "{c}", "{}", "{|d}"])
TEXTS = st.lists(PIECES, max_size=7).map("".join)


def written(text, *numbers, nested=True):
    """numbers: the draws, in order; then 0."""
    left = iter(numbers)
    return "".join(segment.text for segment in expand(text, draw=lambda: next(left, 0.0), nested=nested))


def outcomes(text, *, nested=True):
    """All texts that a text can become, one per path of first, second and last alternatives."""
    return {written(text, *numbers, nested=nested) for numbers in product((0.0, 0.4, 0.6, 0.99), repeat=3)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{simple|white} background", {"simple background", "white background"}),
        ("{{retro style}}", {"{retro style}"}),
        ("1girl, {{a|b}}", {"1girl, {a|b}"}),
        ("{a {{x}}|b}", {"a {x}", "b"}),
        ("{smile, |}1girl", {"smile, 1girl", "1girl"}),
        ("{only}", {"only"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a|{b|{c|d}}}", {"a", "b", "c", "d"}),
        ("{ {a|b}|c} x", {" a x", " b x", "c x"}),
        ("{{{a|b}}}", {"{a", "{b}"}),
        ("a|b", {"a|b"}),
    ],
)
def test_what_a_text_can_become(text, found):
    assert outcomes(text) == found


@pytest.mark.parametrize("text", [":}", ":{", "}:{", "{}", "a {b", "b} a", "{a {}", "", "|", "{a|b"])
def test_a_brace_without_partner_or_content_passes(text):
    assert outcomes(text) == {text}
    assert unmatched_braces(text) == [place for place, letter in enumerate(text) if letter in "{}"]


def test_choices_after_a_lone_brace_still_work():
    assert outcomes(":{ a {b|c}") == {":{ a b", ":{ a c"}
    assert unmatched_braces("{a|b} {{x}} {c|{d|e}}") == []


def test_every_alternative_is_as_likely_as_the_others():
    counts = Counter(written("{a|b|c}", (number + 0.5) / 300) for number in range(300))

    assert counts == {"a": 100, "b": 100, "c": 100}


def test_numbers_are_drawn_from_left_to_right_and_only_for_what_is_written():
    text = "{a|{b|c}} {d|e}"

    assert written(text, 0.0, 0.9) == "a e"
    assert written(text, 0.9, 0.0, 0.9) == "b e"


@given(text=TEXTS)
def test_segments_hold_the_whole_text_and_choices_alone_differ_but_for_escapes(text):
    segments = expand(text, draw=lambda: 0.5)

    assert "".join(segment.raw for segment in segments) == text
    for segment in segments:
        if not segment.is_choice:
            assert segment.text == re.sub(r"\{\{|\}\}", lambda found: found.group()[0], segment.raw)


@given(text=TEXTS)
def test_without_nesting_it_is_kohyas_notation(text):
    """kohya: escapes away, then everything from a brace to the next closing one is a choice, if it is not empty."""
    plain = text.replace("{{", "\1").replace("}}", "\2")
    stretches = re.split(r"\{([^}]+)\}", plain)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(stretches)]
    expected = {"".join(picked).replace("\1", "{").replace("\2", "}") for picked in product(*choices)}
    numbers = [[(place + 0.5) / len(choice) for place in range(len(choice))] for choice in choices[1::2]]

    assert {written(text, *draws, nested=False) for draws in product(*numbers)} == expected
