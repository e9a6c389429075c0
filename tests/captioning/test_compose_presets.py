"""Captions worked out by hand from the rules of the model card, kohya's tagger, dataset-helpers and the wiki."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from captioning.compose import compose
from captioning.config import CaptioningConfig
from sharding.config import load_config

PRESETS = Path(__file__).parents[2] / "configs" / "datasets"
RATINGS = [(name, "rating") for name in ("general", "sensitive", "questionable", "explicit")]


def captions(lab, preset, *overrides, policy="default"):
    config = load_config(PRESETS / preset, CaptioningConfig, overrides)
    report = compose(config, lab.workspace, policy=policy)
    return lab.texts(policy), report


def test_the_seeds_order_and_edges(lab):
    vn = [("vn_name", "Full Name"), ("vn_short", "fna")]
    records = [
        lab.record("a", created_at=datetime(2022, 1, 1, tzinfo=UTC), tags_general=["scan"]),
        lab.record("b", source="pixiv", custom=[("artist_name", "Some One")]),
        lab.record("c", source="visual-novel", custom=vn),
        lab.record("d", source="wallpapers", created_at=datetime(2010, 12, 31, tzinfo=UTC)),
    ]
    lab.keep(records)
    lab.scores("aesthetic", {"a": 0.90, "b": 0.91, "c": 0.10, "d": 0.101})
    lab.scores("quality", {"a": 0.980, "b": 0.981, "c": 0.025, "d": 0.026})
    lab.scores("date", {"a": 2022, "b": 2022, "c": None, "d": 2010}, status="no_date")
    labels = [*RATINGS, ("1girl", "general"), ("long_hair", "general"), ("saber_(fate)", "character")]
    rated = {"a": [0, 0, 1, 0], "b": [0, 1, 0, 0], "c": [0, 0, 0, 1], "d": [1, 0, 0, 0]}
    lab.tags("wd", labels, {"a": {4: 0.9, 6: 0.5}, "b": {5: 0.35, 6: 0.49}, "c": {}, "d": {4: 0.34}}, **rated)

    texts, _ = captions(lab, "sotediffusion.toml")

    assert texts == [
        "very aesthetic, high quality, newest, nsfw, saber, fate, scan, 1girl",
        "extremely aesthetic, best quality, art by Some One, sensitive, long hair",
        "very displeasing, worst quality, Full Name (fna), visual novel cg, explicit nsfw",
        "displeasing, low quality, oldest, anime wallpaper, general",
    ]


def test_kohyas_command_line(lab):
    # --remove_underscore --use_rating_tags --character_tags_first --character_tag_expand --append_tags
    labels = [
        *RATINGS, ("1girl", "general"), ("long_hair", "general"), ("^_^", "general"), ("(o)_(o)", "general"),
        ("a_b", "general"), ("a_bc", "general"), ("hatsune_miku", "character"), ("o_o_(xy)", "character"),
        ("saber_(fate)", "character"), ("tamamo_(swimsuit_lancer)_(fate)", "character"),
    ]  # fmt: skip
    probs = {4: 0.9, 5: 0.35, 6: 0.4, 7: 0.4, 8: 0.4, 9: 0.4, 10: 0.5, 11: 0.5, 12: 0.6, 13: 0.7}
    lab.keep([lab.record("a")])
    lab.tags("wd", labels, {"a": probs}, a=[0.1, 0.6, 0.2, 0.1])
    policy = {
        "groups": ["custom", "rating", "character", "rest"],
        "custom": {"boards": "mine"},
        "rating": {"questionable": "questionable", "explicit": "explicit"},
        "tags": {"tagger": "wd", "kohya_characters": True, "keep_underscores": []},
    }
    config = lab.config(annotate={"models": {"wd": {"kind": "wd_tagger", "model": "x"}}}, policies={"default": policy})

    compose(config, lab.workspace, policy="default")

    # There `fate` stands twice. Characters are in reverse order of the labels; tags of up to three characters keep
    # their underscore, but "o_o, xy" is longer than that.
    assert lab.texts() == [
        "mine, sensitive, tamamo (swimsuit lancer), fate, saber, o o, xy, hatsune miku, "
        "1girl, long hair, ^_^, (o) (o), a_b, a bc"
    ]


def test_dataset_helpers_order(lab):
    first = lab.record(
        "a",
        created_at=datetime(2021, 5, 1, tzinfo=UTC),
        rating="sensitive",
        format="jpeg",
        num_bytes=307_199,
        custom=[("fav_count", "120"), ("score", "9000")],
        tags_general=["skirt", "1990s_(style)", "pleated_skirt", "1girl", "^_^", "male_focus", "1boy"],
        tags_artist=["some_one"],
        tags_character=["saber", "saber_(fate/zero)"],
        tags_copyright=["fate_(series)", "fate/zero", "original", "type-moon"],
        tags_meta=["highres", "traditional_media", "watercolor_(medium)", "photoshop_(medium)", "bad_twitter_id"],
    )
    second = lab.record(
        "b", created_at=datetime(2017, 5, 1, tzinfo=UTC), rating="general", format="png", num_bytes=10,
        custom=[("score", "51")],
    )  # fmt: skip
    third = lab.record("c", created_at=None, format="jpeg", num_bytes=307_200, tags_general=["1980s_(style)", "sky"])
    pixiv = {"tags_general": ["girl", "R-18", "illustration", "sky", "girls"], "tags_character": ["OC"]}
    fourth = lab.record("d", source="pixiv", created_at=None, format="png", **pixiv)
    lab.keep([first, second, third, fourth])
    # 0.9 + 0.92 + 0.80 + 0.70 = 3.32: above 0.5 + 0.875 + 0.585 + 0.3698, not above 0.992 + 0.911 + 0.786 + 0.6942.
    lab.scores("wd-aes", {"a": 0.9, "b": None, "c": None, "d": None})
    lab.scores("shadow", {"a": 0.92, "b": 0.92, "c": None, "d": None})
    lab.scores("deepghs", {"a": 0.80, "b": None, "c": 0.1, "d": None})
    lab.scores("waifu-scorer", {"a": 0.70, "b": None, "c": None, "d": None})
    lab.scores("style-age", {"a": 1970, "b": 2010, "c": 1970, "d": None})
    labels = [*RATINGS, *((name, "general") for name in ("2girls", "smile", "long_hair", "sky"))]
    lab.tags("wd", labels, {"a": {4: 0.9, 5: 0.8, 6: 0.95, 7: 0.35}, "b": {}, "c": {}, "d": {}}, a=[0, 0, 0, 1])

    texts, report = captions(lab, "dataset_helpers.toml")

    assert texts == [
        # fav_count 120 of an explicit picture is "normal", percentile 0.80 "great"; the score does not count
        "moderate aesthetic, great quality, year 2021, 1990s (style), art by some one, watercolor (medium), "
        "explicit nsfw rating, 1girl, 1boy, male focus, character saber (fate/zero), from type-moon, "
        "pleated skirt, ^_^, compression artifacts, long hair, smile, traditional media",
        # shadow alone; 51 > 50 of a general one; 2010 looks older than 2017
        "highly aesthetic, best quality, year 2017, 2010s (style), sfw rating",
        # no date, so neither year nor style
        "worst aesthetic, worst quality, sky",
        # the black list of pixiv; what a board calls "girl" or "illustration" would stand
        "sky, girls",
    ]
    assert report.missing["aesthetic (some of its scores)"] == 2


WIKI = """
gotou hitori | 1girl black_shirt frown standing facing_away from_above pink_hair
kita ikuyo | from_below facing_to_the_side blue_dress smile walking red_hair solo
shiina mahiru | facing_viewer school_uniform lying blazer from_behind blush
kubo nagisa | looking_at_viewer blush school_uniform cardigan smile sitting facing_back uniform
oyama mahiro | jitome tareme sitting
"""


def test_the_wikis_own_examples(lab):
    lines = [line.split(" | ") for line in WIKI.strip().splitlines()]
    records = [
        lab.record(f"k{place}", source="character", tags_character=[name.replace(" ", "_")], tags_general=tags.split())
        for place, (name, tags) in enumerate(lines)
    ]
    records[4] |= {"tags_artist": ["nekotofu"]}
    lab.keep(records)

    texts, _ = captions(
        lab,
        "wiki_character.toml",
        "policies.wiki_character.characters={}",
        "policies.wiki_character.traits={}",
        'policies.wiki_character.tags.tagger=""',
        'policies.wiki_character.tags.record_categories=["general", "character", "artist"]',
        policy="wiki_character",
    )

    assert texts == [
        "gotou hitori, black shirt, frown, standing, facing away, from above",
        "kita ikuyo, blue dress, smile, walking, facing to the side, from below",
        "shiina mahiru, school uniform, blazer, blush, lying, facing viewer, from behind",
        "kubo nagisa, school uniform, cardigan, blush, smile, sitting, facing back, looking at viewer",
        "oyama mahiro, nekotofu, jitome, tareme, sitting",
    ]


@pytest.mark.parametrize(
    ("policy", "expected", "num_many"),
    [
        (
            "wiki_character",
            "gotou hitori, pleated skirt, blush, smile, sitting, holding guitar, looking at viewer, from above, "
            "full body",
            1,
        ),
        ("name_only", "gotou hitori, outdoors", 0),
    ],
)
def test_the_name_carries_its_traits_and_long_captions_are_counted(lab, policy, expected, num_many):
    tags = (
        "1girl track_suit pink_jacket skirt pleated_skirt blush smile sitting holding_guitar looking_at_viewer "
        "from_above full_body outdoors"
    )
    lab.keep([lab.record("a", source="character", tags_general=tags.split())])

    texts, report = captions(lab, "wiki_character.toml", f'policies.{policy}.tags.tagger=""', policy=policy)

    assert texts == [expected]
    assert report.num_many_tags == num_many
    assert ("warn_above_tags: 1" in report.summary()) == bool(num_many)
