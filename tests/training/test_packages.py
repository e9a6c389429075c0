import importlib.machinery

import pytest

from tests.training.toy import toy_config
from training import packages
from training.cli import main
from training.packages import missing_packages, require_packages

CASES = [
    ("optimizer.name='adamw8bit'", "bitsandbytes", "gpu"),
    ("optimizer.name='prodigy'", "prodigyopt", "optimizers"),
    ("optimizer.name='schedule_free'", "schedulefree", "optimizers"),
    ("parallel.strategy='zero2'", "deepspeed", "gpu"),
    ("trackers.wandb='offline'", "wandb", "train"),
    ("trackers.tensorboard=true", "tensorboard", "train"),
]


def without(monkeypatch, *names):
    """Let this Python have all packages but these."""
    spec = importlib.machinery.ModuleSpec("there", None)
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in names else spec)


@pytest.mark.parametrize("setting, package, extra", CASES)
def test_a_launch_without_a_package_is_refused_before_anything_is_made(
    monkeypatch, capsys, run_toml, tmp_path, setting, package, extra
):
    without(monkeypatch, package)

    settings = ["--set", setting, "--set", "optimizer.learning_rate=1.0"]  # prodigy takes no small one

    code = main(["run", str(run_toml), "--run-dir", str(tmp_path / "run"), *settings])

    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert line.startswith(f"error: {setting.split('=')[0]}")
    assert f"needs the package {package}: run `pip install -e '.[{extra}]'`" in line
    assert not (tmp_path / "run").exists()


def test_a_plan_refuses_what_a_launch_would_and_shows_the_rest(monkeypatch, capsys, run_toml):
    without(monkeypatch, "wandb")

    code = main(["plan", str(run_toml), "--set", "trackers.wandb='online'"])

    text = capsys.readouterr().out
    assert code == 2
    assert 'refused: trackers.wandb "online" needs the package wandb' in text
    assert "the run:" in text


def test_every_missing_package_is_named_at_once(monkeypatch):
    without(monkeypatch, "wandb", "prodigyopt")
    config = toy_config(
        optimizer={"name": "prodigy", "learning_rate": 1.0, "max_grad_norm": 0.0}, trackers={"wandb": "online"}
    )

    with pytest.raises(ValueError, match=r"prodigyopt.*; .*wandb"):
        require_packages(config)


def test_what_the_settings_do_not_name_is_not_needed(monkeypatch):
    without(monkeypatch, *(package for _, package, _ in CASES))

    assert missing_packages(toy_config(trackers={"tensorboard": False})) == []
