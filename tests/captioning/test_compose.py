"""Captions: order, thresholds, spelling, missing values, resuming, and that no model is touched."""

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from captioning.compose import AnnotationMissingError, compose
from sharding.config import ConfigError
from sharding.schema import CAPTIONS
from sharding.tables import part_metadata, part_name, read_part, schema_mismatch

PERIODS = {"newest": [2022, 2024], "oldest": [2005, 2010]}
SCORER = {"kind": "aesthetic_shadow", "model": "unused"}
TAGGER = {"kind": "wd_tagger", "model": "unused"}
LABELS = [
    *((name, "rating") for name in ("general", "sensitive", "questionable", "explicit")),
    ("1girl", "general"),
    ("long_hair", "general"),
    ("^_^", "general"),
    ("hatsune_miku", "character"),
    ("saber_(fate)", "character"),
    ("rin_(fate)", "character"),
]
TIERS = {
    "aesthetic": {"model": "aes", "comparison": ">", "steps": [[0.9, "fine"], [0.5, "fair"]], "rest": "poor"},
    "quality": {"model": "qual", "comparison": ">=", "steps": [[0.5, "good"]], "rest": ""},
}
ORDER = ["aesthetic", "quality", "date", "custom", "rating", "character", "series", "rest"]


def policy(**values):
    base = {"groups": ["date", "custom", "rating", "character", "series", "rest"]}
    return base | values


def compose_one(lab, records, *, rules=None, models=None, sources=None):
    lab.keep(records)
    extra = {"sources": sources} if sources else {}
    config = lab.config(
        periods=PERIODS, annotate={"models": models or {}}, policies={"default": rules or policy()}, **extra
    )
    return compose(config, lab.workspace, policy="default")


def test_groups_stand_in_the_policys_order(lab):
    record = lab.record("a", rating="explicit", tags_general=["1girl", "long_hair"], tags_character=["saber_(fate)"])
    lab.scores("aes", {"a": 0.95})
    lab.scores("qual", {"a": 0.5})
    lab.tags("wd", LABELS, {"a": {4: 0.9, 6: 0.35}}, a=[0.1, 0.2, 0.6, 0.1])
    rules = policy(groups=ORDER, tiers=TIERS, custom={"boards": "scan"}, tags={"comparison": ">=", "tagger": "wd"})

    compose_one(lab, [record], rules=rules, models={"aes": SCORER, "qual": SCORER, "wd": TAGGER})

    assert lab.texts() == ["fine, good, newest, scan, nsfw, saber, fate, 1girl, long hair, ^_^"]
    table = read_part(lab.workspace.captions("default") / part_name(0))
    assert schema_mismatch(table, CAPTIONS) == ""
    groups = table.column("groups").to_pylist()[0]
    assert [(it["group"], it["tags"]) for it in groups] == [
        ("aesthetic", ["fine"]),
        ("quality", ["good"]),
        ("date", ["newest"]),
        ("custom", ["scan"]),
        ("rating", ["nsfw"]),
        ("character", ["saber"]),
        ("series", ["fate"]),
        ("rest", ["1girl", "long hair", "^_^"]),
    ]


@pytest.mark.parametrize(("comparison", "expected"), [(">=", "hatsune miku, 1girl"), (">", "")])
def test_a_probability_equal_to_its_threshold_follows_the_comparison(lab, comparison, expected):
    lab.tags("wd", LABELS, {"a": {4: 0.35, 7: 0.5}})
    rules = policy(groups=["character", "rest"], tags={"tagger": "wd", "comparison": comparison})

    compose_one(lab, [lab.record("a")], rules=rules, models={"wd": TAGGER})

    assert lab.texts() == [expected]


def test_character_tags_have_their_own_threshold_and_two_of_one_series_name_it_once(lab):
    lab.tags("wd", LABELS, {"a": {4: 0.34, 7: 0.49, 8: 0.5, 9: 0.9}})
    rules = policy(groups=["character", "series", "rest"], tags={"tagger": "wd", "comparison": ">="})

    compose_one(lab, [lab.record("a")], rules=rules, models={"wd": TAGGER})

    assert lab.texts() == ["saber, rin, fate"]


def test_a_missing_score_gives_no_word_and_is_counted(lab):
    records = [lab.record(key) for key in "abc"]
    lab.scores("aes", {"a": 0.0, "b": None, "c": 0.6})
    rules = policy(groups=["aesthetic"], tiers={"aesthetic": TIERS["aesthetic"]})

    report = compose_one(lab, records, rules=rules, models={"aes": SCORER})

    assert lab.texts() == ["poor", "", "fair"]
    assert report.missing == {"aesthetic": 1} and report.num_empty == 1
    assert "without a word for aesthetic: 1" in report.summary()


def test_custom_words_come_from_the_records_own_fields_by_source(lab):
    sources = {name: {"root": "x", "dataset": name} for name in ("pixiv", "vn", "boards")}
    sources["boards"]["dataset"] = "{period}"
    records = [
        lab.record("a", source="pixiv", custom=[("artist_name", "Ann, the_1st")]),
        lab.record("b", source="pixiv"),
        lab.record("c", source="vn", custom=[("vn_name", "Full Name"), ("vn_short", "fna")]),
        lab.record("d", source="vn", custom=[("vn_name", "Full Name")]),
        lab.record("e", source="boards", created_at=datetime(2010, 12, 31, tzinfo=UTC)),
        lab.record("f", source="boards", created_at=None),
    ]
    custom = {
        "pixiv": "art by {artist_name}",
        "vn": "{vn_name} ({vn_short}), visual novel cg",
        "boards": "{period}, from {dataset} of {year}",
    }

    report = compose_one(lab, records, rules=policy(groups=["custom"], custom=custom), sources=sources)

    assert lab.texts() == [
        "art by Ann the_1st",
        "",
        "Full Name (fna), visual novel cg",
        "visual novel cg",
        "oldest, from oldest of 2010",
        "",
    ]
    assert report.missing == {"custom": 3}


def test_a_word_stands_once_where_its_first_group_is(lab):
    record = lab.record("a", tags_general=["newest", "1girl", "1girl"], tags_copyright=["1girl"])

    compose_one(lab, [record], rules=policy(custom={"boards": "{period}, wallpaper"}))

    assert lab.texts() == ["newest, wallpaper, 1girl"]


def test_the_date_word_can_be_kept_to_some_sources_and_comes_from_the_scorer(lab):
    sources = {"boards": {"root": "x"}, "pixiv": {"root": "x"}}
    records = [lab.record("a"), lab.record("b", source="pixiv"), lab.record("c")]
    lab.scores("date", {"a": 2005.0, "b": 2005.0, "c": None}, status="no_date")
    rules = policy(groups=["date"], date={"model": "date", "sources": ["boards"]})

    report = compose_one(lab, records, rules=rules, models={"date": {"kind": "date"}}, sources=sources)

    assert lab.texts() == ["oldest", "", ""]
    assert report.missing == {"date": 1}


@pytest.mark.parametrize(
    ("prefer", "expected"), [(["tagger", "record"], ["sensitive", "nsfw"]), (["record"], ["explicit nsfw", "nsfw"])]
)
def test_the_rating_is_the_preferred_ones_or_else_the_others(lab, prefer, expected):
    records = [lab.record("a", rating="explicit"), lab.record("b", rating="questionable")]
    lab.tags("wd", LABELS, {"a": {}, "b": {}}, a=[0.1, 0.5, 0.2, 0.2])
    rules = policy(groups=["rating"], rating={"prefer": prefer}, tags={"tagger": "wd", "comparison": ">="})

    compose_one(lab, records, rules=rules, models={"wd": TAGGER})

    assert lab.texts() == expected


def test_tags_of_a_category_without_its_group_go_to_rest(lab):
    record = lab.record(
        "a", tags_general=["tree"], tags_artist=["some_one"], tags_character=["saber_(fate)"], tags_meta=["highres"]
    )
    tags = {"comparison": ">=", "record_categories": ["general", "artist", "character"], "drop_tags": ["fate"]}

    compose_one(lab, [record], rules=policy(groups=["series", "rest"], tags=tags))

    assert lab.texts() == ["tree, some one, saber"]


def test_dropped_tags_are_compared_exactly_and_before_spelling(lab):
    record = lab.record("a", tags_general=["jpeg_artifacts", "artifacts"])

    compose_one(lab, [record], rules=policy(groups=["rest"], tags={"comparison": ">=", "drop_tags": ["artifacts"]}))

    assert lab.texts() == ["jpeg artifacts"]


def test_tags_of_the_record_come_first_or_last_as_preferred(lab):
    record = lab.record("a", tags_general=["solo", "1girl"])
    lab.tags("wd", LABELS, {"a": {4: 0.9, 5: 0.9}})
    tags = {"tagger": "wd", "comparison": ">=", "prefer": ["tagger", "record"]}

    compose_one(lab, [record], rules=policy(groups=["rest"], tags=tags), models={"wd": TAGGER})

    assert lab.texts() == ["1girl, long hair, solo"]


def test_an_image_without_tagger_result_keeps_its_own_tags(lab):
    lab.tags("wd", LABELS, {"a": {}})
    rules = policy(tags={"tagger": "wd", "comparison": ">="})

    compose_one(lab, [lab.record("a", rating="general", tags_general=["solo"])], rules=rules, models={"wd": TAGGER})

    assert lab.texts() == ["newest, general, solo"]


def test_annotations_in_another_order_are_aligned_by_key(lab):
    lab.scores("aes", {"b": 0.1, "a": 0.95, "z": 0.6})
    rules = policy(groups=["aesthetic"], tiers={"aesthetic": TIERS["aesthetic"]})

    compose_one(lab, [lab.record("a"), lab.record("b")], rules=rules, models={"aes": SCORER})

    assert lab.texts() == ["fine", "poor"]


def test_keys_without_an_annotation_row_are_an_error_that_says_how_many(lab):
    lab.scores("aes", {"a": 0.1})
    rules = policy(groups=["aesthetic"], tiers={"aesthetic": TIERS["aesthetic"]})

    with pytest.raises(AnnotationMissingError, match=r"1 of 2 keys have no row, first b; run .*annotate"):
        compose_one(lab, [lab.record("a"), lab.record("b")], rules=rules, models={"aes": SCORER})


def test_a_missing_annotation_part_is_an_error(lab):
    rules = policy(groups=["aesthetic"], tiers={"aesthetic": TIERS["aesthetic"]})

    with pytest.raises(AnnotationMissingError, match="run `python -m captioning annotate --models aes` first"):
        compose_one(lab, [lab.record("a")], rules=rules, models={"aes": SCORER})


def test_current_parts_are_left_alone_and_a_threshold_change_remakes_them(lab):
    lab.scores("aes", {"a": 0.55})
    tiers = {"aesthetic": TIERS["aesthetic"]}
    first = compose_one(lab, [lab.record("a")], rules=policy(groups=["aesthetic"], tiers=tiers), models={"aes": SCORER})
    path = lab.workspace.captions("default") / part_name(0)
    written, stamp = path.read_bytes(), path.stat().st_mtime_ns

    second = compose_one(
        lab, [lab.record("a")], rules=policy(groups=["aesthetic"], tiers=tiers), models={"aes": SCORER}
    )
    stamp_after = path.stat().st_mtime_ns
    changed = {"aesthetic": TIERS["aesthetic"] | {"steps": [[0.9, "fine"], [0.6, "fair"]]}}
    third = compose_one(
        lab, [lab.record("a")], rules=policy(groups=["aesthetic"], tiers=changed), models={"aes": SCORER}
    )

    assert [it.num_parts_written for it in (first, second, third)] == [1, 0, 1]
    assert stamp == stamp_after
    assert path.read_bytes() != written and lab.texts() == ["poor"]
    assert part_metadata(path)["policy"] == "default"


def test_new_annotations_or_records_remake_the_part(lab):
    rules = policy(groups=["aesthetic"], tiers={"aesthetic": TIERS["aesthetic"]})
    lab.scores("aes", {"a": 0.55})
    compose_one(lab, [lab.record("a")], rules=rules, models={"aes": SCORER})

    lab.scores("aes", {"a": 0.95, "b": 0.1})
    report = compose_one(lab, [lab.record("a")], rules=rules, models={"aes": SCORER})

    assert report.num_parts_written == 1 and lab.texts() == ["fine"]


def test_a_dry_run_writes_nothing_and_counts(lab):
    lab.keep([lab.record("a")], [lab.record("b"), lab.record("c")])
    config = lab.config(policies={"default": policy()})

    report = compose(config, lab.workspace, policy="default", dry_run=True)

    assert (report.num_parts_written, report.num_captions) == (2, 3)
    assert not lab.workspace.captions("default").exists()


def test_tasks_share_the_parts_and_an_index_outside_is_refused(lab):
    lab.keep([lab.record("a")], [lab.record("b")], [lab.record("c")])
    config = lab.config(policies={"default": policy()})

    reports = [compose(config, lab.workspace, policy="default", part_index=n, num_parts=2) for n in range(2)]

    assert [it.num_captions for it in reports] == [2, 1]
    with pytest.raises(ValueError, match="--part-index 2 is outside"):
        compose(config, lab.workspace, policy="default", part_index=2, num_parts=2)


def test_an_empty_part_gives_an_empty_part(lab):
    compose_one(lab, [], rules=policy(custom={"boards": "{period}"}))

    assert lab.texts() == []


def test_mistakes_in_a_policy_are_named_with_their_place(lab):
    with pytest.raises(ConfigError, match=r"unknown group 'aesthetics'; known: .*rest"):
        lab.config(policies={"default": policy(groups=["aesthetics"])})
    with pytest.raises(ConfigError, match=r"'aes' is no scorer of annotate\.models"):
        lab.config(policies={"default": policy(groups=["aesthetic"], tiers={"aesthetic": TIERS["aesthetic"]})})
    with pytest.raises(ConfigError, match=r"'low' at 0.1 must be above 'high' at 0.9"):
        tier = TIERS["aesthetic"] | {"steps": [[0.1, "low"], [0.9, "high"]]}
        lab.config(policies={"default": policy(groups=["aesthetic"], tiers={"aesthetic": tier})})
    with pytest.raises(ConfigError, match="unknown source 'pixiv'"):
        lab.config(policies={"default": policy(custom={"pixiv": "x"})})
    with pytest.raises(ConfigError, match="lower probabilities are not stored"):
        rules = policy(tags={"tagger": "wd", "comparison": ">=", "general_threshold": 0.01})
        lab.config(policies={"default": rules}, annotate={"models": {"wd": TAGGER}})
    with pytest.raises(ConfigError, match="unknown key"):
        lab.config(policies={"default": policy(threshold=0.5)})


def test_composing_imports_neither_torch_nor_a_runtime_nor_transformers():
    code = (
        "import sys, captioning.compose, captioning.stats, captioning.cli\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
