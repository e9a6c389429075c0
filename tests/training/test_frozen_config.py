import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.frozen_config import Change, ConfigChangedError, freeze_config, to_toml, write_grown

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_what_is_written_as_toml_reads_back_the_same(config):
    assert tomllib.loads(to_toml(config)) == config


def test_toml_is_laid_out_for_people():
    config = {
        "seed": 1,
        "save": {"every_steps": 100, "export_dtype": None, "paths": (Path("a"), Path("b"))},
        "optimizer": {"betas": [0.9, 0.999], "lr": 1e-05, "extra": {"a b": True}},
        "prompts": [{"text": "a cat" * 15, "seed": 1, "note": None}, {"text": "a dog", "seed": 2}],
    }

    assert to_toml(config) == (
        "seed = 1\n"
        "prompts = [\n"
        f'    {{text = "{"a cat" * 15}", seed = 1}},\n'
        '    {text = "a dog", seed = 2},\n'
        "]\n"
        "\n[save]\nevery_steps = 100\n"
        'paths = ["a", "b"]\n'
        "\n[optimizer]\nbetas = [0.9, 0.999]\nlr = 1e-05\n"
        '\n[optimizer.extra]\n"a b" = true\n'
    )


@pytest.mark.parametrize("config", [{"a": object()}, {"a": [None]}, {1: 2}])
def test_what_toml_cannot_say_is_refused_by_name(config):
    with pytest.raises(TypeError, match="config"):
        to_toml(config)


def test_the_first_launch_freezes_the_config_and_the_same_one_is_accepted(tmp_path):
    path = tmp_path / "run.toml"
    config = {
        "seed": 1,
        "data": {"chunks": ["newest/*"], "limit": None},
        "optimizer": {"lr": 1e-5, "betas": (0.9, 0.99)},
    }

    assert freeze_config(path, config, free=()) == {}
    first = path.read_bytes()

    assert freeze_config(path, config, free=()) == {}
    assert path.read_bytes() == first


def test_a_changed_key_is_refused_and_every_change_is_listed(tmp_path):
    path = tmp_path / "run.toml"
    freeze_config(path, {"seed": 1, "optimizer": {"lr": 1e-5, "decay": 0.1}}, free=())

    with pytest.raises(ConfigChangedError) as caught:
        freeze_config(path, {"seed": 2, "optimizer": {"lr": 2e-5, "clip": 1.0}}, free=())

    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        "  seed: was 1, now 2",
        "  optimizer.lr: was 1e-05, now 2e-05",
        "  optimizer.decay: was 0.1, now (not set)",
        "  optimizer.clip: was (not set), now 1.0",
    ]


def test_free_keys_and_tables_may_change_and_are_returned(tmp_path):
    path = tmp_path / "run.toml"
    freeze_config(path, {"seed": 1, "preview": {"every_steps": 5}, "loader": {"workers": 2}}, free=())
    changed = {"seed": 1, "preview": {"every_steps": 9}, "loader": {"workers": 3, "prefetch": 4}}

    changes = freeze_config(path, changed, free={"preview.every_steps", "loader"})

    expected = {"preview.every_steps": (5, 9), "loader.workers": (2, 3), "loader.prefetch": (None, 4)}
    assert changes == {key: Change(*change) for key, change in expected.items()}
    assert tomllib.loads(path.read_text())["preview"]["every_steps"] == 5
    with pytest.raises(ConfigChangedError, match=r"loader\.workers: was 2, now 3"):
        freeze_config(path, changed, free={"preview"})


def test_true_is_not_one(tmp_path):
    path = tmp_path / "run.toml"
    freeze_config(path, {"a": 1, "b": 1}, free=())

    with pytest.raises(ConfigChangedError, match="a: was 1, now true"):
        freeze_config(path, {"a": True, "b": 1.0}, free=())


def test_a_growing_key_may_get_larger_and_is_then_the_frozen_one(tmp_path):
    path, free, growing = tmp_path / "run.toml", {"data.chunks"}, {"data.epochs", "data.chunks"}
    freeze_config(path, {"data": {"epochs": 1, "chunks": ["a/*"]}}, free=free, growing=growing)
    grown = {"data": {"epochs": 3, "chunks": ["b/*", "a/*"]}}

    changes = freeze_config(path, grown, free=free, growing=growing)
    write_grown(path, {key: change for key, change in changes.items() if change.has_grown})

    assert {key: tuple(change) for key, change in changes.items()} == {
        "data.epochs": (1, 3, True), "data.chunks": (["a/*"], ["b/*", "a/*"], True),
    }  # fmt: skip
    assert tomllib.loads(path.read_text()) == grown
    with pytest.raises(ConfigChangedError, match=r"data\.epochs: was 3, now 2 \(it may only grow\)"):
        freeze_config(path, {"data": {"epochs": 2, "chunks": ["a/*"]}}, free=free, growing=growing)
