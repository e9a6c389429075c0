from pathlib import Path

import pytest

from sharding.config import Config, load_config
from training.config import FREE_KEYS, RunConfig
from training.config.data import BucketConfig

ROOT = Path(__file__).parents[2]


def keys() -> list[str]:
    """Every settable key of a run.toml, dotted."""
    found = []
    for name, field in RunConfig.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))  # a table may be left out
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]
        found += [f"{name}.{inner}" for table in tables for inner in table.model_fields] or [name]
    return found


def test_every_setting_stands_in_the_readme_with_a_star_when_it_is_free():
    text = (ROOT / "training" / "README.md").read_text()

    wrong = [key for key in keys() if f"| `{key}`{' *' if key in FREE_KEYS else ''} | " not in text]

    assert wrong == []


def test_free_keys_are_keys():
    assert set(keys()) >= FREE_KEYS


@pytest.mark.parametrize("preset", sorted((ROOT / "configs" / "training").glob("*.toml")), ids=lambda path: path.stem)
def test_presets_are_valid_and_open_with_their_command(preset):
    config = load_config(preset, RunConfig, [])

    opening = preset.read_text().split("\n\n[")[0]
    assert config.name
    assert f"{preset.relative_to(ROOT)}" in opening


def test_ratios_may_be_written_as_width_to_height():
    buckets = BucketConfig(ratios=("16:9", 0.5, "1:1"))

    assert buckets.ratios == (16 / 9, 0.5, 1.0)
    assert BucketConfig.model_validate(buckets.model_dump()) == buckets


@pytest.mark.parametrize("value", ["3", "3:0", "a:b", 0, -1.5])
def test_a_ratio_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="ratios"):
        BucketConfig(ratios=(value,))
