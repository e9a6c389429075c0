import pytest

from sharding.config import Config, ConfigError, DatasetConfig, load_config, parse_config

MINIMAL = """
name = "test"
[sources.danbooru]
root = "raw/danbooru"
importer = "booru"
dataset = "{period}"
[sources."anime wallpaper"]
root = "raw/wall"
priority = 2
[periods]
newest = [2022, 2024]
oldest = [2005, 2010]
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "x.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_minimal_config_has_the_defaults(write):
    config = load_config(write(MINIMAL), DatasetConfig)

    assert config.part_size == 8000 and config.filters.min_pixels == 768_000
    assert config.sources["anime wallpaper"].priority == 2
    with pytest.raises(ValueError, match="frozen"):
        config.part_size = 3


def test_pictures_are_filed_by_source_or_by_date(write):
    config = load_config(write(MINIMAL), DatasetConfig)

    assert config.file_under("danbooru", 2023) == ("newest", "newest")
    assert config.file_under("danbooru", 2015) == ("", "")
    assert config.file_under("danbooru", None) == ("", "")
    assert config.file_under("anime wallpaper", 2005) == ("anime wallpaper", "oldest")


def test_every_mistake_is_reported_at_once_with_its_key(write):
    text = MINIMAL + '[dedupe]\nhash_size = 40\nradios = 3\n[filters]\nmax_aspect = 0.5\n[plan]\nchunk_size = "many"\n'

    with pytest.raises(ConfigError) as caught:
        load_config(write(text), DatasetConfig)

    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all("x.toml: " in line for line in lines)
    assert any("dedupe.radios: unknown key; known here: algorithm, find_crops, hash_size" in line for line in lines)
    assert any("dedupe.hash_size: " in line and "40" in line for line in lines)
    assert any("filters.max_aspect: " in line and "0.5" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[periods]\na = [2010, 2005]", "first year 2010 is after last year 2005"),
        ("[periods]\na = [2005, 2010]\nb = [2010, 2012]", "periods.a and periods.b both hold the year 2010"),
        ("", "no [periods] table"),
    ],
)
def test_periods_that_contradict_are_refused(write, change, message):
    text = MINIMAL.split("[periods]")[0] + change

    with pytest.raises(ConfigError) as caught:
        load_config(write(text), DatasetConfig)

    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["", " a", "a/b", "..", "a  b", "a.", "a\\b", "a:b"])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(ConfigError, match="inner spaces"):
        parse_config({"name": name, "sources": {"a": {"root": "x"}}}, DatasetConfig, name="x")


def test_overrides_are_toml_or_text(write):
    overrides = ["dedupe.radius=3", "name = other name", "filters.tag_blacklist=['comic']", "max_broken_fraction=1e-2"]

    config = load_config(write(MINIMAL), DatasetConfig, overrides)

    assert (config.dedupe.radius, config.name, config.max_broken_fraction) == (3, "other name", 0.01)
    assert config.filters.tag_blacklist == ("comic",)


@pytest.mark.parametrize(
    ("override", "message"), [("name", "expected key.path=value"), ("name.x=1", "name is a value")]
)
def test_overrides_that_make_no_sense_are_refused(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(MINIMAL), DatasetConfig, [override])


def test_a_missing_file_bad_syntax_and_foreign_bytes_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="presets are in configs"):
        load_config(tmp_path / "none.toml", DatasetConfig)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(write("name = "), DatasetConfig)
    (tmp_path / "x.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "x.toml", DatasetConfig)


def test_numbers_that_are_none_are_refused():
    class Settings(Config):
        rate: float

    with pytest.raises(ConfigError, match="rate: "):
        parse_config({"rate": float("nan")}, Settings, name="x")
    with pytest.raises(ConfigError, match="rate: required, but not set"):
        parse_config({}, Settings, name="x")


def test_a_radius_that_merges_unrelated_pictures_is_refused():
    for dedupe, message in (
        (
            {"hash_size": 8, "radius": 16},
            "radius 16 of the 64 bits of phash with hash_size 8 merges unrelated pictures",
        ),
        ({"hash_size": 33}, "dedupe.hash_size: hash_size 33: must be from 4 to 32"),
        ({"algorithm": "whash", "hash_size": 12}, "dedupe.hash_size: hash_size 12 of whash: must be a power of 2"),
        ({"algorithm": "colorhash"}, "hash_size 16 of colorhash: it is its binbits, from 2 to 8"),
        ({"algorithm": "colorhash", "hash_size": 3, "turns": ["flip"]}, "a turned picture has the same colorhash"),
        ({"turns": ["flip", "flip"]}, "turns: flip, flip: name each once"),
        ({"turns": ["rotate_45"]}, "dedupe.turns"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config({"name": "x", "sources": {"a": {"root": "a"}}, "dedupe": dedupe}, DatasetConfig, name="x.toml")

        assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("dedupe", "radius", "max_diameter"),
    [
        ({}, 16, 32),
        ({"hash_size": 8}, 4, 8),
        ({"algorithm": "dhash", "hash_size": 32}, 64, 128),
        ({"algorithm": "colorhash", "hash_size": 3}, 2, 5),
        ({"hash_size": 8, "max_diameter": 3}, 4, 3),
    ],
)
def test_radii_scale_with_the_bits_of_the_hash(dedupe, radius, max_diameter):
    config = parse_config(
        {"name": "x", "sources": {"a": {"root": "a"}}, "dedupe": dedupe}, DatasetConfig, name="x.toml"
    ).dedupe

    assert (config.radius, config.max_diameter) == (radius, max_diameter)
