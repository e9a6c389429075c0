"""configs/datasets/sotediffusion.toml against the tables of the model card, line by line."""

import re
from pathlib import Path

import numpy as np
import pytest

from captioning.config import CaptioningConfig
from captioning.tiers import tier_numbers
from sharding.config import load_config

PRESETS = Path(__file__).parents[2] / "configs" / "datasets"

AESTHETIC = """
| **0.90** | extremely aesthetic | 125.451 |
| **0.80** | very aesthetic | 887.382 |
| **0.70** | aesthetic | 1.049.857 |
| **0.50** | slightly aesthetic | 1.643.091 |
| **0.40** | not displeasing | 569.543 |
| **0.30** | not aesthetic | 445.188 |
| **0.20** | slightly displeasing | 341.424 |
| **0.10** | displeasing | 237.660 |
| **rest of them** | very displeasing | 328.712 |
"""
QUALITY = """
| **0.980** | best quality | 1.270.447 |
| **0.900** | high quality | 498.244 |
| **0.750** | great quality | 351.006 |
| **0.500** | medium quality | 366.448 |
| **0.250** | normal quality | 368.380 |
| **0.125** | bad quality | 279.050 |
| **0.025** | low quality | 538.958 |
| **rest of them** | worst quality | 1.955.966 |
"""
DATE = """
| **newest** | 2022 to 2024 |
| **recent** | 2019 to 2021 |
| **mid** | 2015 to 2018 |
| **early** | 2011 to 2014 |
| **oldest** | 2005 to 2010 |
"""
RATING = """
| **general** | 1.416.451 |
| **sensitive** | 3.447.664 |
| **nsfw** | 427.459 |
| **explicit nsfw** | 336.925 |
"""
ORDER = "aesthetic tags, quality tags, date tags, custom tags, rating tags, character, series, rest of the tags"
COMMAND = (
    "--remove_underscore --use_rating_tags --character_tags_first --character_tag_expand --append_tags "
    "--general_threshold 0.35 --character_threshold 0.50 --batch_size 4"
)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]


@pytest.fixture(scope="module")
def config() -> CaptioningConfig:
    return load_config(PRESETS / "sotediffusion.toml", CaptioningConfig)


@pytest.mark.parametrize(("group", "table"), [("aesthetic", AESTHETIC), ("quality", QUALITY)])
def test_every_tier_has_the_cards_threshold_and_word(config, group, table):
    *steps, (_, rest, _) = cells(table)

    tiers = config.policies["default"].tiers[group]

    assert tiers.comparison == ">"
    assert [(threshold, word) for threshold, word in tiers.steps] == [(float(t), word) for t, word, _ in steps]
    assert tiers.rest == rest


@pytest.mark.parametrize(("group", "table"), [("aesthetic", AESTHETIC), ("quality", QUALITY)])
def test_a_score_equal_to_a_threshold_gets_the_next_word(config, group, table):
    tiers = config.policies["default"].tiers[group]
    words = [word for _, word, _ in cells(table)]
    edges = np.array([threshold for threshold, _ in tiers.steps], dtype=np.float32)
    thresholds = [threshold for threshold, _ in tiers.steps]

    at = tier_numbers(edges, thresholds, comparison=tiers.comparison)
    above = tier_numbers(np.nextafter(edges, np.float32(2)), thresholds, comparison=tiers.comparison)

    assert [words[number] for number in at] == words[1:]
    assert [words[number] for number in above] == words[:-1]


def test_every_period_has_the_cards_years(config):
    assert {name: f"{first} to {last}" for name, (first, last) in config.periods.items()} == dict(cells(DATE))


def test_rating_words_are_the_cards(config):
    assert list(config.policies["default"].rating.words) == [word for word, _ in cells(RATING)]


def test_groups_are_in_the_cards_order(config):
    order = [re.sub(r" tags$| of the tags$", "", name) for name in ORDER.split(", ")]

    assert list(config.policies["default"].groups) == order


def test_the_taggers_options_are_those_of_the_cards_command(config):
    flags = dict(re.findall(r"--(\w+)(?: ([\d.]+))?", COMMAND))
    tags = config.policies["default"].tags

    assert (tags.general_threshold, tags.character_threshold) == (
        float(flags["general_threshold"]),
        float(flags["character_threshold"]),
    )
    assert tags.remove_underscores and tags.character_tag_expand and tags.prefer == ("record", "tagger")
    assert config.annotate.batch_size == int(flags["batch_size"])
    assert config.annotate.models["wd"].model == "SmilingWolf/wd-swinv2-tagger-v3"
    assert config.annotate.models["aesthetic"].model == "shadowlilac/aesthetic-shadow-v2"
    assert config.annotate.models["quality"].head == "hakurei/waifu-diffusion-v1-4/models/aes-B32-v0.pth"
    assert config.annotate.models["quality"].clip == "openai/clip-vit-base-patch32"


def test_the_eight_datasets_custom_tags_and_sizes_are_the_cards(config):
    filed = {
        name for source in config.sources for year in range(2005, 2025) for name in [filed_as(config, source, year)]
    }
    custom = {config.sources[source].dataset: words for source, words in config.policies["default"].custom.items()}

    card = ["newest", "recent", "mid", "early", "oldest", "pixiv", "visual novel cg", "anime wallpaper"]
    assert filed == set(card)
    assert custom == {
        "{period}": "{period}",
        "pixiv": "art by {artist_name}",
        "visual novel cg": "{vn_name} ({vn_short}), visual novel cg",
        "anime wallpaper": "{period}, anime wallpaper",
    }
    assert config.plan.chunk_size == 8_000 and config.filters.min_pixels == 1280 * 600


def test_the_demo_has_the_same_tables_in_small(config):
    demo = load_config(PRESETS / "demo.toml", CaptioningConfig)

    assert demo.periods == config.periods
    assert demo.policies["default"].tiers == config.policies["default"].tiers
    assert demo.policies["default"].groups == config.policies["default"].groups
    assert demo.policies["default"].custom == config.policies["default"].custom
    assert (demo.plan.chunk_size, demo.combine.chunk_size) == (12, 24)


def filed_as(config: CaptioningConfig, source: str, year: int) -> str:
    return config.file_under(source, year)[0]
