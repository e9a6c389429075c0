"""captioning/README.md says what is so: its example scorer runs, its worked example and its settings are the code's."""

import importlib.util
import re
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest

from captioning import cli, config, policy, registry, scorers, tag_rules, word_rules
from captioning.compose import compose
from captioning.config import CaptioningConfig
from captioning.scorers.measure import Measure
from captioning.taggers.base import TaggerSettings
from sharding.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "captioning" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """The README's scorer, put in its place and registered by the README's line."""
    source, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "brightness.py").write_text(source)
    name = "captioning.scorers.brightness"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "brightness.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(scorers, "brightness", module, raising=False)
    spec.loader.exec_module(module)
    kind, value = re.search(r'registry\.py`.*`"(\w+)": (\w+),`', README).groups()
    monkeypatch.setitem(registry.PLUGINS, kind, {"brightness": module}[value])
    return source


def test_the_example_scorer_is_short_and_passes_its_own_test(brightness):
    _, test, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}

    exec(test, names)
    names["test_white_is_1_and_black_is_0"]()

    assert sum(1 for line in brightness.splitlines() if line.strip()) <= 30


def test_the_example_scorer_annotates_and_its_tiers_become_captions(lab, brightness):
    (tables,) = re.findall(r"```toml\n(.*?)```", README.split("## Adding a scorer")[1], re.DOTALL)
    path = lab.folder / "light.toml"
    path.write_text(f'name = "light"\nannotate.workers = 0\nsources.boards.root = "{lab.pictures}"\n{tables}')
    records = lab.save(lab.plain(255), lab.plain(20))
    lab.keep(records)
    place = [str(path), "--workspace", str(lab.workspace.root)]

    codes = [cli.main([command, *place]) for command in ("annotate", "compose")]

    assert codes == [0, 0]
    assert [round(row["score"] * 255) for row in lab.rows("brightness").values()] == [255, 20]
    assert lab.texts() == ["bright", "dark"]


def test_the_snippets_are_a_table_of_every_kind(lab):
    tables, *_ = re.findall(r"```toml\n(.*?)```", README.split("## Models")[1], re.DOTALL)
    models = tomllib.loads(tables)["annotate"]["models"]

    read = lab.config(annotate={"models": models}).annotate.models

    assert {settings.kind for settings in read.values()} == set(registry.PLUGINS)
    measures = re.findall(r"^\| `(\w+)` \| [^|]* \|$", README.split("| `measure` | number |")[1], re.MULTILINE)
    assert measures == list(get_args(Measure))


def test_the_worked_example_is_what_compose_makes_of_its_numbers(lab):
    demo = load_config(ROOT / "configs" / "datasets" / "demo.toml", CaptioningConfig)
    general = (
        "1girl ascot blue_eyes blue_shirt brown_hair long_hair looking_at_viewer outdoors park solo tree upper_body"
    )
    created = datetime(2013, 3, 11, tzinfo=UTC)
    tags = {"tags_character": ["sylvie_(the_question)"], "tags_copyright": ["the_question"]}
    lab.keep([lab.record("a", rating="general", created_at=created, tags_general=general.split(), **tags)])
    for model, score in (("aesthetic", 0.0165), ("quality", 0.9219), ("date", 2013)):
        lab.scores(model, {"a": score})
    labels = [(name, "general") for name in ("sweat", "black_skirt", "school_uniform")]
    labels.append(("2b_(nier:automata)", "character"))
    probs = {0: 0.623, 1: 0.423, 2: 0.305, 3: 0.352}
    lab.tags("wd", labels, {"a": probs}, a=[0.861, 0.165, 0.508, 0.865])

    compose(demo, lab.workspace, policy="default")

    quoted = " ".join(line.removeprefix("> ") for line in README.split("## Policy")[1].splitlines() if line[:2] == "> ")
    assert lab.texts() == [quoted]


def test_every_setting_stands_in_the_reference():
    reference = README[README.index("## Settings") : README.index("## Not run")]
    named = set(re.findall(r"`(\w+)`", reference))
    tables = [config.AnnotateConfig, policy.PolicyConfig, policy.TokensConfig, policy.SentencesConfig]
    tables += [word_rules.TierConfig, word_rules.VotesConfig, word_rules.DateWordsConfig]
    tables += [word_rules.StyleWordsConfig, word_rules.RatingWordsConfig]
    tables += [tag_rules.TagsConfig, tag_rules.BlacklistConfig, TaggerSettings]
    tables += [plugin.Settings for plugin in registry.PLUGINS.values()]

    assert {key for table in tables for key in table.model_fields} <= named
    assert all(f"| `{kind}` |" in README for kind in registry.PLUGINS)
