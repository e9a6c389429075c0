from pathlib import Path

import pytest

from sharding.config import Config, load_config
from training.config import FREE_KEYS, RunConfig

ROOT = Path(__file__).parents[2]


def keys() -> list[str]:
    """Every settable key of a run.toml, dotted."""
    found = []
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            found += [f"{name}.{inner}" for inner in field.annotation.model_fields]
        else:
            found.append(name)
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
