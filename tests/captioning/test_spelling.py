"""Spelling of single tags."""

import pytest

from captioning.spelling import clean_word, expand_character, spell_tag
from captioning.tag_rules import KAOMOJI


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("long_hair", "long hair"),
        ("very_long_hair", "very long hair"),
        ("star_(sky)", "star (sky)"),
        ("o_o", "o_o"),
        (";_;", ";_;"),
        ("(o)_(o)", "(o)_(o)"),
        ("<|>_<|>", "<|>_<|>"),
        ("||_||", "||_||"),
        (":d", ":d"),
        ("hello,_world", "hello world"),
        ("two\nlines", "two lines"),
    ],
)
def test_underscores_become_spaces_but_not_in_faces(tag, expected):
    assert spell_tag(tag, remove_underscores=True, keep_underscores=frozenset(KAOMOJI)) == expected


def test_every_face_of_the_list_survives():
    assert [spell_tag(face, remove_underscores=True, keep_underscores=frozenset(KAOMOJI)) for face in KAOMOJI] == list(
        KAOMOJI
    )


def test_underscores_stay_when_asked_to():
    assert spell_tag("long_hair", remove_underscores=False, keep_underscores=frozenset()) == "long_hair"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("hatsune_miku", ("hatsune_miku", "")),
        ("saber_(fate)", ("saber", "fate")),
        ("2b_(nier:automata)", ("2b", "nier:automata")),
        ("tamamo_no_mae_(swimsuit_lancer)_(fate)", ("tamamo_no_mae_(swimsuit_lancer)", "fate")),
        ("name(series)", ("name", "series")),
        ("(series)", ("(series)", "")),
        ("smile_:)", ("smile_:)", "")),
        ("empty_()", ("empty_()", "")),
    ],
)
def test_the_last_parenthesis_of_a_character_is_its_series(tag, expected):
    assert expand_character(tag) == expected


def test_a_display_name_cannot_split_a_caption():
    assert clean_word(" A,  B\r\nC ") == "A B C"
