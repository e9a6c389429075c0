"""Rules about tags in a policy: tables, black lists, groups, places, what tags remove, tokens."""

import numpy as np
import pytest

from captioning.compose import compose
from captioning.tag_stream import mcut
from captioning.tiers import NO_TIER, summed_tier_numbers, voted_tier_numbers
from sharding.config import ConfigError
from sharding.tables import part_name, read_part

TAGGER = {"kind": "wd_tagger", "model": "unused", "floor": 0.05}


def captions(lab, records, *, tags=None, models=None, **rules):
    lab.keep(records)
    policy = {"groups": ["character", "series", "rest"], "tags": tags or {}} | rules
    config = lab.config(policies={"default": policy}, annotate={"models": models or {}})
    report = compose(config, lab.workspace, policy="default")
    return lab.texts(), report


def general(lab, *tags, key="a", **values):
    return lab.record(key, tags_general=list(tags), **values)


def test_tables_may_be_files_and_their_content_decides_what_is_current(lab):
    (lab.folder / "alias.csv").write_text("# old, new\nlonghair,long_hair\n")
    (lab.folder / "drop.txt").write_text("watermark\n\n# comment\n#compass\n")
    (lab.folder / "replace.toml").write_text('"long hair" = "hair, long"\nsolo = ""\n'.replace(", long", " of length"))
    files = {name: str(lab.folder / name) for name in ("alias.csv", "drop.txt", "replace.toml")}
    record = general(lab, "longhair", "watermark", "solo", "long_hair", "#compass")
    rules = {"tags": {"alias": files["alias.csv"], "drop_tags": files["drop.txt"]}, "replace": files["replace.toml"]}

    texts, _ = captions(lab, [record], **rules)
    _, again = captions(lab, [record], **rules)
    (lab.folder / "drop.txt").write_text("watermark\nlong_hair\n#compass\n")
    changed, report = captions(lab, [record], **rules)

    assert texts == ["hair of length"] and again.num_parts_written == 0
    assert changed == [""] and report.num_parts_written == 1


def test_a_list_for_tag_completion_gives_its_aliases(lab):
    path = lab.folder / "danbooru.csv"
    rows = [
        'long_hair,0,4350743,"/lh,longhair"',
        'solo,0,5000954,"female_solo,rare"',
        "rare,0,1,solo",
        "#compass,3,1,compass",
    ]
    path.write_text("\n".join(rows))
    record = general(lab, "longhair", "female_solo", "/lh", "compass", "rare")

    texts, _ = captions(lab, [record], tags={"alias": str(path)})

    # `rare` is a tag of the list, so it is no other name of solo
    assert texts == ["long hair, solo, #compass, rare"]


def test_black_lists_are_exact_unless_asked_otherwise(lab):
    tags = ["comic", "comic_panel", "jpeg_artifacts", "bad_id", "bad_pixiv_id", "artifacts"]
    lists = {"general": {"tags": ["comic"], "substrings": ["jpeg"], "patterns": ["bad_.*_id"]}}

    texts, _ = captions(lab, [general(lab, *tags)], tags={"blacklist": lists})

    assert texts == ["comic panel, bad id, artifacts"]


@pytest.mark.parametrize(
    ("rule", "expected"), [("drop", "pleated skirt, solo"), ("add", "pleated skirt, skirt, solo, clothes")]
)
def test_implied_tags_are_dropped_or_added(lab, rule, expected):
    tags = {"implied": {"pleated_skirt": ["skirt", "clothes"]}, "implied_rule": rule}

    texts, _ = captions(lab, [general(lab, "pleated_skirt", "skirt", "solo")], tags=tags)

    assert texts == [expected]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("skirt pleated_skirt", "pleated skirt"),
        ("hair long_hair very_long_hair", "very long hair"),
        ("shirt no_shirt", "shirt, no shirt"),
        ("skirt skirt_lift", "skirt, skirt lift"),
        ("hair hair_ribbon ribbon", "hair, hair ribbon"),
        ("bed sitting_on_bed", "bed, sitting on bed"),
        ("ass grass", "ass, grass"),
        ("girl 1girl", "girl, 1girl"),
        ("nipples covered_nipples", "nipples, covered nipples"),
        ("star star_(sky) (sky)", "star, star (sky), (sky)"),
        ("^_^ _", "^_^, _"),
    ],
)
def test_a_tag_is_redundant_under_one_that_ends_with_all_its_words(lab, tags, expected):
    texts, _ = captions(lab, [general(lab, *tags.split())], tags={"drop_redundant": True})

    assert texts == [expected]


def test_redundant_tags_are_those_of_the_same_picture_and_not_the_kept_ones(lab):
    records = [general(lab, "skirt", key="a"), general(lab, "pleated_skirt", "sky", "blue_sky", key="b")]

    texts, _ = captions(lab, records, tags={"drop_redundant": True, "keep_redundant": ["sky"]})

    assert texts == ["skirt", "pleated skirt, sky, blue sky"]


def test_first_words_stand_in_their_own_group_in_the_listed_order(lab):
    record = general(lab, "sky", "solo", "mine_only", rating="explicit")

    captions(lab, [record], groups=["first", "rating", "rest"], first_words=["mine only", "explicit nsfw", "solo"])

    row = read_part(lab.workspace.captions("default") / part_name(0)).to_pylist()[0]
    assert row["text"] == "mine only, explicit nsfw, solo, sky"
    assert [(it["group"], it["tags"]) for it in row["groups"]] == [
        ("first", ["mine only", "explicit nsfw", "solo"]),
        ("rest", ["sky"]),
    ]


def test_templates_counts_media_and_groups_of_ones_own(lab):
    record = lab.record(
        "a", tags_general=["red_dress", "1boy", "smile", "2girls"], tags_artist=["a_b_c"],
        tags_character=["rin"], tags_copyright=["fate"], tags_meta=["oil_(medium)", "photoshop_(medium)", "scan"],
    )  # fmt: skip

    texts, _ = captions(
        lab,
        [record],
        groups=["count", "artist", "character", "series", "medium", "clothing", "rest", "meta"],
        tags={"record_categories": ["general", "character", "copyright", "artist", "meta"]},
        tag_groups={"clothing": ["*_dress"]},
        templates={
            "artist": "art by {tag}",
            "series": "from {tag}",
            "character": "character {tag}",
            "clothing": "in {tag}",
        },
    )

    assert texts == [
        "2girls, 1boy, art by a b c, character rin, from fate, oil (medium), in red dress, smile, "
        "photoshop (medium), scan"
    ]


def test_implied_tags_are_followed_and_known_by_their_other_names(lab):
    implied = {"pleated": ["skirt"], "skirt": ["bottoms"], "lower": ["clothes"]}
    alias = {"pleated": "pleated_skirt", "bottoms": "lower"}
    record = general(lab, "pleated_skirt", "lower", "clothes", "solo")

    dropped, _ = captions(lab, [record], tags={"implied": implied, "alias": alias})
    added, _ = captions(
        lab, [general(lab, "pleated")], tags={"implied": implied, "alias": alias, "implied_rule": "add"}
    )

    assert dropped == ["pleated skirt, solo"]
    assert added == ["pleated skirt, skirt, lower, clothes"]


def test_a_sources_black_list_is_for_its_pictures_only_whoever_tagged_them(lab):
    labels = [("girl", "general"), ("sky", "general"), ("ann_(mine)", "character")]
    lab.tags("wd", labels, {key: {0: 0.9, 1: 0.9, 2: 0.9} for key in "ab"})
    tags_of = {"tags_general": ["illustration", "jpeg_artifacts"], "tags_character": ["oc", "rin_(original)"]}
    lab.keep([lab.record("a", source="pixiv", **tags_of), lab.record("b", **tags_of)])
    lists = {"tags": ["girl", "illustration", "oc", "original"], "patterns": ["m.ne"]}
    tags = {"tagger": "wd", "source_blacklist": {"pixiv": lists}}
    tags |= {"blacklist": {"general": {"substrings": ["artifacts"]}}}
    # kohya's order turns the characters of each origin round and puts each series behind its character.
    for is_kohya, pixiv, boards in (
        (False, "rin, ann", "oc, rin, ann, original, mine"),
        (True, "rin, ann", "rin, original, oc, ann, mine"),
    ):
        policy = {"groups": ["character", "series", "rest"], "tags": tags | {"kohya_characters": is_kohya}}
        config = lab.config(
            sources={name: {"root": "x"} for name in ("boards", "pixiv")},
            annotate={"models": {"wd": TAGGER}},
            policies={"default": policy},
        )
        compose(config, lab.workspace, policy="default")

        assert lab.texts() == [f"{pixiv}, sky", f"{boards}, illustration, girl, sky"]


def test_a_barred_tag_neither_removes_nor_comes_back_by_an_implication(lab):
    tags = {"source_blacklist": {"boards": {"tags": ["pleated_skirt", "clothes"]}}}
    implied = {"pleated_skirt": ["skirt"], "sky": ["clothes"]}
    record = general(lab, "pleated_skirt", "skirt", "sky", "clothes")

    for rule in ("drop", "add"):
        texts, _ = captions(lab, [record], tags=tags | {"implied": implied, "implied_rule": rule})

        assert texts == ["skirt, sky"]


def test_a_character_that_says_less_of_the_same_one_can_go(lab):
    names = [
        "miku",
        "miku_(vocaloid)",
        "rin_(vocaloid)",
        "miku_(append)_(vocaloid)",
        "saber_alter_(fate)",
        "saber_(fate)",
    ]
    tags = {"character_tag_expand": False, "drop_base_characters": True}
    records = [lab.record("a", tags_character=names), lab.record("b", tags_character=["miku"])]

    texts, _ = captions(lab, records, tags=tags)

    assert texts == ["rin (vocaloid), miku (append) (vocaloid), saber alter (fate), saber (fate)", "miku"]


def test_a_caption_without_a_word_gets_the_fallback_and_is_counted(lab):
    records = [lab.record("a"), general(lab, "sky", key="b"), general(lab, "watermark", key="c")]

    texts, report = captions(
        lab, records, fallback="my  style, drawing,", tags={"drop_tags": ["watermark"]}, replace={"drawing": "no"}
    )

    assert texts == ["my style, drawing", "sky", "my style, drawing"]
    assert (report.num_fallback, report.num_empty) == (2, 0) and "given the fallback: 2" in report.summary()
    rows = read_part(lab.workspace.captions("default") / part_name(0)).to_pylist()
    assert [row["key"] for row in rows] == ["a", "b", "c"]
    assert rows[2]["groups"] == [{"group": "rest", "tags": ["my style", "drawing"]}]


def test_a_series_in_its_characters_parentheses_is_dropped(lab):
    whole = lab.record("a", tags_character=["saber_(fate)"], tags_copyright=["fate_(series)", "fate", "fate/zero"])
    part = lab.record("b", tags_character=["mash_(fate/grand_order)"], tags_copyright=["fate_(series)", "fat", "order"])
    tags = {"character_tag_expand": False, "drop_series_of_characters": True}

    texts, _ = captions(lab, [whole, part], tags=tags)

    assert texts == ["saber (fate), fate/zero", "mash (fate/grand order), fat, order"]


def test_a_blacklisted_series_does_not_come_back_from_a_characters_name(lab):
    record = lab.record("a", tags_character=["ann_(original)"], tags_copyright=["original"])

    texts, _ = captions(lab, [record], tags={"blacklist": {"copyright": {"tags": ["original"]}}})

    assert texts == ["ann"]


def test_traits_go_with_their_character_only(lab):
    traits = {"gotou_hitori": ["pink_hair", "track_suit"]}
    records = [
        general(lab, "pink_hair", "smile", key="a", tags_character=["gotou_hitori"]),
        general(lab, "pink_hair", "smile", key="b", tags_character=["kita_ikuyo"]),
        general(lab, "pink_hair", key="c"),
    ]

    texts, _ = captions(lab, records, traits=traits)

    assert texts == ["gotou hitori, smile", "kita ikuyo, pink hair, smile", "pink hair"]


def test_the_family_name_comes_first_and_a_source_names_its_character(lab):
    records = [lab.record("a", tags_character=["asuka_souryuu_(eva)"]), lab.record("b")]
    tags = {"given_name_first": ["asuka_souryuu", "mine_family"]}

    texts, _ = captions(lab, records, tags=tags, characters={"boards": "mine_family"})

    assert texts == ["family mine, souryuu asuka, eva", "family mine"]


def test_tags_of_some_groups_come_from_the_record_only(lab):
    labels = [("1girl", "general"), ("solo", "general"), ("rin", "character")]
    lab.tags("wd", labels, {"a": {0: 0.9, 1: 0.4, 2: 0.9}})
    tags = {"tagger": "wd", "record_only": ["count", "character"]}

    texts, _ = captions(lab, [lab.record("a")], tags=tags, models={"wd": TAGGER}, groups=["count", "character", "rest"])

    assert texts == ["solo"]


def test_the_most_probable_tags_can_come_first(lab):
    labels = [("a", "general"), ("b", "general"), ("c", "general")]
    lab.tags("wd", labels, {"a": {0: 0.4, 1: 0.9, 2: 0.4}})

    texts, _ = captions(lab, [lab.record("a")], tags={"tagger": "wd", "order": "confidence"}, models={"wd": TAGGER})

    assert texts == ["b, a, c"]


def test_mcut_cuts_at_the_largest_gap_of_each_row():
    rows = np.array([0, 0, 0, 0, 2, 3, 3])
    probs = np.array([0.3, 0.95, 0.35, 0.9, 0.2, 0.5, 0.45], dtype=np.float32)

    # Row 0: 0.95 0.9 | 0.35 0.3; row 2: 0.2 | floor; row 3: 0.5 0.45 | floor.
    assert mcut(rows, probs, floor=0.05).tolist() == [False, True, False, True, True, True, True]
    assert mcut(np.empty(0, np.int64), np.empty(0, np.float32), floor=0.05).tolist() == []


def test_mcut_in_a_policy_has_the_thresholds_as_its_least(lab):
    labels = [("a", "general"), ("b", "general"), ("c", "general"), ("rin", "character")]
    lab.tags("wd", labels, {"k": {0: 0.6, 1: 0.55, 2: 0.1, 3: 0.14}})
    tags = {"tagger": "wd", "mcut": ["general", "character"], "general_threshold": 0.05, "character_threshold": 0.15}

    texts, _ = captions(lab, [lab.record("k")], tags=tags, models={"wd": TAGGER})

    assert texts == ["a, b"]


def test_summed_scores_are_compared_with_the_thresholds_of_those_that_are_there():
    nan = float("nan")
    scores = np.array([[0.75, 0.75, nan, nan], [0.5, nan, 0.5, nan]], dtype=np.float32)
    thresholds = np.array([[0.75, 0.5], [0.5, 0.25]], dtype=np.float32)

    assert summed_tier_numbers(scores, thresholds, comparison=">").tolist() == [1, 1, 1, NO_TIER]
    assert summed_tier_numbers(scores, thresholds, comparison=">=").tolist() == [0, 0, 0, NO_TIER]


def test_votes_depend_on_the_rating():
    votes = np.array([50, 51, 51, float("nan"), 51], dtype=np.float32)
    ratings = np.array([0, 0, 1, 0, -1])

    assert voted_tier_numbers(votes, ratings, [[50, 1], [150, 5]], comparison=">").tolist() == [1, 0, 1, -1, -1]


def test_votes_alone_give_words(lab):
    votes = {"general": [50], "sensitive": [50], "questionable": [50], "explicit": [50]}
    tiers = {"liked": {"comparison": ">", "steps": [[1, "liked"]], "rest": "plain", "votes": votes}}
    records = [
        lab.record("a", rating="general", custom=[("fav_count", "51")]),
        lab.record("b", rating="general", custom=[("fav_count", "many"), ("score", "-3")]),
        lab.record("c", custom=[("fav_count", "51")]),
    ]

    texts, report = captions(lab, records, groups=["liked"], tiers=tiers)

    assert texts == ["liked", "plain", ""] and report.missing == {"liked": 1}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"templates": {"artist": "art by {artist}"}}, r"templates\.artist: needs \{tag\}"),
        ({"first_words": ["solo"]}, "first_words: groups lacks 'first'"),
        ({"tags": {"blacklist": {"general": {"patterns": ["("]}}}}, "is no regular expression"),
        ({"tags": {"alias": "missing.csv"}}, "missing.csv: cannot be read as a table of tags"),
        ({"tag_groups": "wiki"}, "ends in .toml or .csv, or one of traits, wiki_character"),
        ({"tags": {"record_only": ["nobody"]}}, "unknown group 'nobody'"),
        ({"tokens": {"cut_first": ["meta"]}}, "unknown group 'meta'"),
        ({"replace": {"a": "b, c"}}, "replace.a: 'b, c' has a comma"),
        ({"tiers": {"x": {"comparison": ">", "steps": [[1, "a"]]}}, "groups": ["x"]}, "model: required"),
        ({"characters": {"pixiv": "rin"}}, "unknown source 'pixiv'"),
        ({"tags": {"source_blacklist": {"pixiv": {"tags": ["girl"]}}}}, "source_blacklist: unknown source 'pixiv'"),
        ({"tags": {"alias": {"a": "b", "b": "a"}}}, "alias: a → b → a is a circle"),
        ({"tags": {"implied": {"a": ["b"], "b": ["a"]}}}, "implied: 'a' implies itself through 'b'"),
        ({"tags": {"alias": {"c": "a"}, "implied": {"a": ["b"], "b": ["c"]}}}, "implied: 'a' implies itself"),
        ({"tags": {"general_threshold": float("nan")}}, "finite number"),
        ({"fallback": "none", "groups": ["character"]}, "custom or rest in groups"),
        ({"fallback": " , "}, "fallback: needs words"),
        ({"rating": {"explicit": "nsfw, explicit"}}, "'nsfw, explicit' is not one word"),
        ({"tiers": {"x": {"model": "m", "comparison": ">", "steps": [[1, "a,b"]]}}, "groups": ["x"]}, "not one word"),
    ],
)
def test_mistakes_are_named_with_their_place(lab, rules, message):
    with pytest.raises(ConfigError, match=message):
        lab.config(policies={"default": {"groups": ["rest"]} | rules})
