"""configs/datasets/sotediffusion.toml against the tables of the model card, line by line."""

import re
from pathlib import Path

import numpy as np
import pytest

from captioning.config import CaptioningConfig
from captioning.edit_table import SEPARATOR
from captioning.tiers import tier_numbers
from sharding.config import load_config

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "configs" / "datasets"
README = (ROOT / "captioning" / "README.md").read_text(encoding="utf-8")

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
    'tag_images_by_wd14_tagger.py --model_dir "/mnt/DataSSD/AI/models/wd14_tagger_model" '
    '--repo_id "SmilingWolf/wd-swinv2-tagger-v3" --recursive --remove_underscore --use_rating_tags '
    '--character_tags_first --character_tag_expand --append_tags --onnx --caption_separator ", " '
    '--general_threshold 0.35 --character_threshold 0.50 --batch_size 4 --caption_extension ".txt" ./'
)
DATASETS = """
| **newest** | 1.848.331 | 232 |
| **recent** | 1.380.630 | 173 |
| **mid** | 993.227 | 125 |
| **early** | 566.152 | 071 |
| **oldest** | 160.397 | 021 |
| **pixiv** | 343.614 | 043 |
| **visual novel cg** | 231.358 | 029 |
| **anime wallpaper** | 104.790 | 014 |
| **Total** | 5.628.499 | 708 |
"""
CUSTOM = """
| **image boards** | date, |
| **pixiv** | art by Display_Name, |
| **visual novel cg** | Full_VN_Name (short_3_letter_name), visual novel cg, |
| **anime wallpaper** | date, anime wallpaper, |
"""
FIELDS = {
    "date": "{period}", "Display_Name": "{artist_name}",
    "Full_VN_Name": "{vn_name}", "short_3_letter_name": "{vn_short}",
}  # fmt: skip
"""What stands in the card for a value, and the field that has it here."""


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


def test_every_flag_of_the_cards_command_has_a_setting_with_its_value(config):
    flags = {name: value.strip('"') for name, value in re.findall(r"--(\w+)(?: (\"[^\"]*\"|[\d.]+))?", COMMAND)}
    policy, annotate = config.policies["default"], config.annotate
    tags, groups = policy.tags, policy.groups
    settings = {
        "model_dir": flags["model_dir"],  # a place on one machine
        "repo_id": annotate.models[tags.tagger].model,
        "recursive": "",  # sources are always read with all folders below
        "remove_underscore": "" if tags.remove_underscores else None,
        "use_rating_tags": "" if "rating" in groups and policy.rating.prefer[0] == "tagger" else None,
        "character_tags_first": "" if groups[-3:] == ("character", "series", "rest") else None,
        "character_tag_expand": "" if tags.character_tag_expand else None,
        "append_tags": "" if tags.prefer == ("record", "tagger") else None,
        "onnx": "" if annotate.models[tags.tagger].kind == "wd_tagger" else None,
        "caption_separator": SEPARATOR,
        "general_threshold": f"{tags.general_threshold:.2f}",
        "character_threshold": f"{tags.character_threshold:.2f}",
        "batch_size": str(annotate.batch_size),
        "caption_extension": ".txt",  # KEY.txt in shards
    }

    assert len(flags) == 14 and settings == flags
    assert tags.comparison == ">="  # as its code compares


def test_the_readme_says_of_every_flag_which_setting_it_is():
    table = README.split("**The seed's tagger command**")[1].split("**Speed.**")[0]

    named = re.findall(r"^\| `(--\w+)(?: [^`]*)?` \| .+ \|$", table, re.MULTILINE)

    assert sorted(named) == sorted(re.findall(r"--\w+", COMMAND))


def test_the_models_of_the_scores_are_the_cards(config):
    models, tiers = config.annotate.models, config.policies["default"].tiers

    assert models[tiers["aesthetic"].model].model == "shadowlilac/aesthetic-shadow-v2"
    assert models[tiers["quality"].model].head == "hakurei/waifu-diffusion-v1-4/models/aes-B32-v0.pth"
    assert models[tiers["quality"].model].clip == "openai/clip-vit-base-patch32"


def test_every_dataset_has_the_cards_name_and_number_of_chunks(config):
    *datasets, total = cells(DATASETS)
    filed = {config.file_under(source, year)[0] for source in config.sources for year in range(2005, 2025)}

    assert filed == {name for name, _, _ in datasets}
    for name, images, chunks in datasets:
        assert -(-number(images) // config.plan.chunk_size) == number(chunks), name
    assert [sum(number(row[column]) for row in datasets) for column in (1, 2)] == [number(it) for it in total[1:]]
    assert config.plan.chunk_size == 8_000 and config.filters.min_pixels == 1280 * 600


def test_every_datasets_custom_words_are_the_cards(config):
    custom = config.policies["default"].custom
    source_of = {source.dataset: name for name, source in config.sources.items()} | {"image boards": "boards"}
    known = re.compile("|".join(FIELDS))

    assert len(cells(CUSTOM)) == len(custom) == len(config.sources)
    for dataset, words in cells(CUSTOM):
        assert custom[source_of[dataset]] == known.sub(lambda found: FIELDS[found[0]], words).removesuffix(",")


def test_the_demo_has_the_same_tables_in_small(config):
    demo = load_config(PRESETS / "demo.toml", CaptioningConfig)

    assert demo.periods == config.periods
    assert demo.policies["default"].tiers == config.policies["default"].tiers
    assert demo.policies["default"].groups == config.policies["default"].groups
    assert demo.policies["default"].custom == config.policies["default"].custom
    assert (demo.plan.chunk_size, demo.combine.chunk_size) == (12, 24)


def number(text: str) -> int:
    return int(text.replace(".", ""))
