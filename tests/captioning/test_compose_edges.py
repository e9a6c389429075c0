"""Odd tags, odd numbers and pictures of which nothing is known: what stands in their captions."""

import numpy as np
import pyarrow as pa
import pytest

from captioning.compose import compose
from sharding.schema import TAGGER
from sharding.tables import part_name, read_part, write_part

TAGGER_CONFIG = {"kind": "wd_tagger", "model": "unused"}
RATINGS = [(name, "rating") for name in ("general", "sensitive", "questionable", "explicit")]
GROUPS = ["custom", "rating", "character", "series", "rest"]


def captions(lab, *records, models=None, **rules):
    lab.keep(list(records))
    config = lab.config(policies={"default": {"groups": GROUPS} | rules}, annotate={"models": models or {}})
    report = compose(config, lab.workspace, policy="default")
    return lab.texts(), report


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["one,_two", "one_two", "a,b"], "one two, a b"),  # a comma never makes two words; nor the same word twice
        (["", "_", "__", "____", " ", "\n"], "_, __"),
        (["初音ミク", "été", "ÉTÉ", "naïve_art", "\u3000wide\u3000", "line\u2028break"],
         "初音ミク, été, ÉTÉ, naïve art, wide, line break"),
        (["Long_Hair", "long_hair", "long hair"], "Long Hair, long hair"),
        (["^_^", "(o)_(o)", "||_||", ">:(_x", ":_d"], "^_^, (o)_(o), ||_||, >:( x, :_d"),
        (["null", "nan", "none", "true", "1"], "null, nan, none, true, 1"),
        (["x" * 5_000], "x" * 5_000),
    ],
)  # fmt: skip
def test_odd_tags_of_a_record(lab, tags, expected):
    texts, _ = captions(lab, lab.record("a", tags_general=tags))

    assert texts == [expected]
    (row,) = read_part(lab.workspace.captions("default") / part_name(0)).to_pylist()
    assert row["text"] == ", ".join(word for entry in row["groups"] for word in entry["tags"])
    assert row["text"].split(", ") == [word for entry in row["groups"] for word in entry["tags"]]


def test_words_made_equal_by_replacing_stand_once_at_the_first_place(lab):
    replace = {"woman": "1girl", "girl": "1girl", "a": "b", "b": "a"}
    record = lab.record("a", tags_general=["girl", "b", "woman", "1girl", "a"])

    texts, _ = captions(lab, record, replace=replace)

    assert texts == ["1girl, a, b"]


def test_a_series_named_as_its_character_stands_once(lab):
    records = [
        lab.record("a", tags_character=["naruto_(naruto)"], tags_copyright=["naruto"]),
        lab.record("b", tags_character=["black_rock_shooter"], tags_copyright=["black_rock_shooter"]),
    ]

    texts, _ = captions(lab, *records)
    with_words, _ = captions(lab, *records, templates={"series": "from {tag}"})

    assert texts == ["naruto", "black rock shooter"]
    assert with_words == ["naruto, from naruto", "black rock shooter, from black rock shooter"]


@pytest.mark.parametrize("rule", ["drop", "add"])
def test_a_tag_that_is_another_name_and_implied(lab, rule):
    tags = {"alias": {"skirts": "skirt"}, "implied": {"pleated_skirt": ["skirts"]}, "implied_rule": rule}
    record = lab.record("a", tags_general=["skirts", "pleated_skirt"])

    texts, _ = captions(lab, record, tags=tags)

    assert texts == ["pleated skirt" if rule == "drop" else "skirt, pleated skirt"]


def test_numbers_that_are_none_give_no_word(lab):
    nan = float("nan")
    labels = [*RATINGS, ("solo", "general"), ("sky", "general")]
    lab.tags("wd", labels, {"a": {4: nan, 5: 0.9}, "b": {}}, a=[nan, 0.2, 0.9, 0.1], b=[0.1, 0.2, 0.9, 0.1])
    rows = [{"key": "c", "status": "undecodable"}, {"key": "d", "status": "undecodable", "tag_ids": []}]
    path = lab.workspace.annotations("wd") / part_name(0)
    written = read_part(path)
    table = pa.concat_tables([written, pa.Table.from_pylist(rows, schema=TAGGER)])
    write_part(path, table, made_from="tags", metadata={"model_digest": "m"})
    lab.scores("aes", {"a": nan, "b": float("inf"), "c": None, "d": 0.5})
    tiers = {"aesthetic": {"model": "aes", "comparison": ">", "steps": [[0.5, "fine"]], "rest": "poor"}}

    for mcut in ([], ["general"]):
        texts, report = captions(
            lab,
            *(lab.record(key) for key in "abcd"),
            groups=["aesthetic", "rating", "rest"],
            tiers=tiers,
            tags={"tagger": "wd", "mcut": mcut},
            models={"wd": TAGGER_CONFIG, "aes": {"kind": "aesthetic_shadow", "model": "x"}},
        )

        assert texts == ["sky", "nsfw", "", "poor"]
        assert report.missing == {"aesthetic": 3, "rating": 3} and report.num_empty == 1


@pytest.mark.parametrize(
    ("comparison", "expected"), [(">", ["poor", "fine", "poor"]), (">=", ["fine", "fine", "poor"])]
)
def test_scores_at_an_edge_as_float32(lab, comparison, expected):
    edge = np.float32(0.98)  # a little more than 0.98
    scores = {"a": edge, "b": np.nextafter(edge, np.float32(2)), "c": np.nextafter(edge, np.float32(0))}
    lab.scores("aes", {key: float(score) for key, score in scores.items()})
    tiers = {"aesthetic": {"model": "aes", "comparison": comparison, "steps": [[0.98, "fine"]], "rest": "poor"}}

    texts, _ = captions(
        lab, *(lab.record(key) for key in "abc"), groups=["aesthetic"], tiers=tiers,
        models={"aes": {"kind": "aesthetic_shadow", "model": "x"}},
    )  # fmt: skip

    assert texts == expected


def test_thresholds_of_1_and_above_it(lab):
    labels = [*RATINGS, ("solo", "general"), ("rin", "character")]
    lab.tags("wd", labels, {"a": {4: 1.0, 5: 1.0}})
    tags = {"tagger": "wd", "general_threshold": 1.0, "character_threshold": 1.01}

    texts, _ = captions(lab, lab.record("a"), tags=tags, models={"wd": TAGGER_CONFIG})

    assert texts == ["solo"]
