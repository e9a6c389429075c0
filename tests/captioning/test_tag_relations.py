"""What tags have to do with each other, on names alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.tag_relations import all_implied, base_characters, final_names, heads, series_of_parenthesis

TAGS = st.sampled_from("abcdef")


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("miku_(append)_(vocaloid)", ["miku", "miku_(append)", "miku_(vocaloid)"]),
        ("saber_(fate)", ["saber"]),
        ("hatsune_miku", []),
        ("(o)_(o)", ["(o)"]),
        ("a_((b))", []),
        ("", []),
    ],
)
def test_a_character_without_some_of_its_parentheses_says_less(tag, expected):
    assert base_characters(tag) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fate", ["fate"]),
        ("fate/grand_order", ["fate", "fate/grand", "fate/grand_order"]),
        ("honkai:_star_rail", ["honkai", "honkai:_star", "honkai:_star_rail"]),
        (":/", [":/"]),
        ("", []),
    ],
)
def test_a_parenthesis_names_its_series_and_its_leading_words(text, expected):
    assert series_of_parenthesis(text) == [name for it in expected for name in (it, f"{it}_(series)")]


def test_other_names_are_followed_to_the_last_one():
    assert final_names({"a": "b", "b": "c", "c": "c", "d": ""}) == {"a": "c", "b": "c", "c": "c", "d": ""}
    with pytest.raises(ValueError, match="a → b → a is a circle"):
        final_names({"a": "b", "b": "a"})
    with pytest.raises(ValueError, match="x → a → b → a is a circle"):
        final_names({"x": "a", "a": "b", "b": "a"})


def test_implied_tags_are_followed_nearest_first_under_their_final_names():
    implied = {"pleated_skirt": ("skirt",), "skirt": ("clothes",), "mini": ("skirt", "short"), "self": ("self",)}

    found = all_implied(implied, {"mini": "miniskirt", "short": "clothes"})

    assert found == {
        "pleated_skirt": ("skirt", "clothes"),
        "skirt": ("clothes",),
        "miniskirt": ("skirt", "clothes"),
        "self": (),
    }
    with pytest.raises(ValueError, match="'a' implies itself through 'b'"):
        all_implied({"a": ("b",), "b": ("a",)}, {})
    with pytest.raises(ValueError, match="'b' implies itself"):
        all_implied({"a": ("b",), "b": ("c",), "c": ("d",)}, {"d": "b"})


@given(st.dictionaries(TAGS, TAGS))
def test_a_final_name_is_its_own(alias):
    try:
        found = final_names(alias)
    except ValueError:
        return

    assert found.keys() == alias.keys()
    assert all(found.get(name, name) == name for name in found.values())


@given(st.dictionaries(TAGS, st.lists(TAGS, max_size=3).map(tuple)))
def test_what_implied_tags_imply_is_implied_and_never_the_tag_itself(implied):
    try:
        found = all_implied(implied, {})
    except ValueError:
        return

    for tag, others in found.items():
        assert tag not in others and set(implied[tag]) - {tag} <= set(others)
        assert {further for other in others for further in found.get(other, ())} <= set(others)


def test_heads_are_kinds_by_whole_words():
    assert heads("very_long_hair") == ["long_hair", "hair"] and heads("hair") == [] and heads("no_skirt") == []
