from dataclasses import replace
from pathlib import Path

import pytest

from sharding.config import ConfigError, DatasetConfig, FilterConfig, load_config
from sharding.images import FORMATS, ImageFacts
from sharding.metadata import Metadata
from sharding.scanning.filters import RULES, objection_to_file, objection_to_picture, objection_to_post

CONFIGS = Path(__file__).parents[3] / "configs" / "datasets"
FACTS = ImageFacts("jpeg", 1280, 600, "RGB", False, False, True, None)


def reason(objection):
    return objection.reason if objection else ""


@pytest.mark.parametrize(
    ("min_pixels", "width", "expected"),
    [
        (768_000, 1280, ""),  # the reference's checker: 768,000 passes
        (768_000, 1279, "too_small"),
        (768_001, 1280, "too_small"),  # the reference's downloader: more than 768,000
        (768_001, 1281, ""),
    ],
)
def test_the_edge_of_min_pixels_is_inclusive_and_both_references_can_be_had(min_pixels, width, expected):
    filters = FilterConfig(min_pixels=min_pixels)

    assert reason(objection_to_picture(replace(FACTS, width=width), 1, Metadata(), filters)) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(99, "too_few_bytes"), (100, ""), (200, ""), (201, "too_many_bytes"), (0, "")],  # empty_file is said elsewhere
)
def test_bytes_at_both_edges(num_bytes, expected):
    filters = FilterConfig(min_bytes=100, max_bytes=200)

    assert reason(objection_to_file("a.jpg", num_bytes, Metadata(), filters)) == expected


def test_exempt_tags_pass_small_sizes_and_nothing_else():
    filters = FilterConfig(min_bytes=100, min_pixels=10**6, exempt_tags=("pixel_art",), max_aspect=2)
    pixel_art = Metadata(tags={"general": ("pixel_art",)})
    near_miss = Metadata(tags={"general": ("pixel_art_style",)})

    assert reason(objection_to_file("a.png", 5, pixel_art, filters)) == ""
    assert reason(objection_to_file("a.png", 5, near_miss, filters)) == "too_few_bytes"
    assert reason(objection_to_picture(FACTS, 5, near_miss, filters)) == "too_small"
    assert reason(objection_to_picture(FACTS, 5, pixel_art, filters)) == "extreme_aspect"


@pytest.mark.parametrize(
    ("num_bytes", "width", "expected"),
    [(10_240_001, 2048, ""), (10_240_000, 2049, ""), (10_240_001, 2049, "oversize")],
)
def test_oversize_means_more_bytes_and_more_pixels(num_bytes, width, expected):
    filters = FilterConfig(oversize=(10_240_000, 4_194_304))

    assert (
        reason(objection_to_picture(replace(FACTS, width=width, height=2048), num_bytes, Metadata(), filters))
        == expected
    )


def test_formats_are_judged_by_content_and_extensions_by_name():
    filters = FilterConfig(formats=("png",), extensions=(".png",))

    assert reason(objection_to_picture(FACTS, 1, Metadata(), filters)) == "format_not_wanted"
    assert reason(objection_to_file("a/b.PNG", 1, Metadata(), filters)) == ""
    assert reason(objection_to_file("a/b.jpg", 1, Metadata(), filters)) == "extension_not_wanted"
    assert FilterConfig.model_fields["formats"].annotation.__args__[0].__args__ == FORMATS


def test_a_blacklist_is_exact_and_only_the_one_of_that_name_matches_inside():
    post = Metadata(tags={"general": ("comic_book",), "meta": ("jpeg_artifacts", "md5_mismatch")})

    assert objection_to_post(post, FilterConfig(tag_blacklist=("comic", "artifacts"))) is None
    assert reason(objection_to_post(post, FilterConfig(tag_blacklist=("md5_mismatch",)))) == "blacklisted_tag"
    inside = objection_to_post(post, FilterConfig(meta_blacklist_substrings=("artifacts",)))
    assert inside.reason == "blacklisted_meta_substring"
    assert inside.detail == "meta tag jpeg_artifacts contains 'artifacts'"
    assert objection_to_post(post, FilterConfig(meta_blacklist_substrings=("comic",))) is None  # not a meta tag


@pytest.mark.parametrize(
    ("custom", "expected"),
    [
        ({"score": "1", "fav_count": "5"}, ""),
        ({"score": "0", "fav_count": "5"}, "low_score"),
        ({"score": "-3"}, "low_score"),
        ({"score": "1", "fav_count": "4"}, "low_fav_count"),
        ({"fav_count": "9"}, ""),
        ({"score": "many"}, ""),
        ({}, ""),
    ],
)
def test_scores_and_favourites_count_where_they_are_known(custom, expected):
    filters = FilterConfig(min_score=1, min_fav_count=5)

    assert reason(objection_to_post(Metadata(custom=custom), filters)) == expected


def test_flags_drop_under_their_own_names():
    filters = FilterConfig(drop_flags=("is_flagged", "is_pending"))

    assert reason(objection_to_post(Metadata(flags=frozenset({"is_pending"})), filters)) == "is_pending"
    assert objection_to_post(Metadata(flags=frozenset({"is_deleted"})), filters) is None


def test_every_rule_can_be_overruled():
    for rule in ("too_small", "blacklisted_tag", "rating_not_wanted", "animated", "oversize"):
        assert rule in RULES
    for broken in ("undecodable", "too_many_pixels", "vanished", "unreadable"):
        assert broken not in RULES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[filters]\nextensions = ["jpg"]', "filters.extensions.0"),
        ('[filters]\nformats = ["jpg"]', "filters.formats.0"),
        ("[filters]\nmax_bytes = 0", "filters.max_bytes"),
    ],
)
def test_wrong_filters_are_named(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(f'name = "x"\n[sources.a]\nroot = "a"\n{text}\n')

    with pytest.raises(ConfigError, match=message):
        load_config(path, DatasetConfig)


def test_the_strict_preset_has_the_references_filters():
    config = load_config(CONFIGS / "boards_strict.toml", DatasetConfig)
    filters = config.filters
    four_megapixels = replace(FACTS, width=2048, height=2049)
    pixel_art = Metadata(tags={"general": ("pixel_art",)})

    assert len(filters.tag_blacklist) == len(set(filters.tag_blacklist)) == 52
    assert len(filters.meta_blacklist_substrings) == len(set(filters.meta_blacklist_substrings)) == 18
    assert reason(objection_to_file("a.jpg", 102_400, Metadata(), filters)) == "too_few_bytes"
    assert reason(objection_to_file("a.jpg", 102_400, pixel_art, filters)) == ""
    assert reason(objection_to_picture(FACTS, 200_000, Metadata(), filters)) == "too_small"
    assert reason(objection_to_picture(four_megapixels, 10_240_001, Metadata(), filters)) == "oversize"
    assert reason(objection_to_post(Metadata(custom={"score": "0"}), filters)) == "low_score"
