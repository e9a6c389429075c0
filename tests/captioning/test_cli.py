"""Exit codes, help and the whole line from kept parts to tables of counts."""

import subprocess
import sys
import time

import pytest

from captioning import cli

POLICY = """
[policies.default]
groups = ["aesthetic", "date", "rating", "rest"]
[policies.default.tiers.aesthetic]
model = "aesthetic"
comparison = ">"
steps = [[0.5, "fine"]]
rest = "poor"
[policies.default.tags]
tagger = "wd"
comparison = ">="
"""


@pytest.fixture
def dataset(lab, model_tables):
    """A dataset.toml with a tagger, a scorer and a policy, and one kept part."""
    lines = ['name = "small"', "max_broken_fraction = 0.3", "[sources.boards]", f'root = "{lab.pictures}"']
    lines += ["[periods]", "newest = [2022, 2024]", "[annotate]", "workers = 0"]
    for name in ("wd", "aesthetic"):
        lines += [f"[annotate.models.{name}]", *(f'{key} = "{it}"' for key, it in model_tables[name].items())]
    path = lab.folder / "small.toml"
    path.write_text("\n".join(lines) + POLICY)
    lab.keep(lab.save(lab.png(64, 64, seed=1), lab.png(80, 64, seed=2), lab.png(64, 80, seed=3)))
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_the_line_runs_from_pictures_to_counts(lab, dataset, capsys):
    place = ["--workspace", lab.workspace.root]

    codes = [run(command, dataset, *place) for command in ("annotate", "compose", "stats")]

    output = capsys.readouterr().out
    assert codes == [0, 0, 0]
    assert "3 images, 3 decodes" in output and "3 captions" in output
    assert "newest" in output and "rest of them" in output and "(none)" in output
    assert len(lab.texts()) == 3


def test_counts_add_up_and_pictures_without_a_score_have_their_own_line(lab):
    from captioning.compose import compose
    from captioning.stats import stats

    lab.keep([lab.record(key) for key in "abcd"])
    lab.scores("aes", {"a": 0.9, "b": 0.1, "c": None, "d": 0.6})
    tiers = {"aesthetic": {"model": "aes", "comparison": ">", "steps": [[0.5, "fine"]], "rest": "poor"}}
    config = lab.config(
        annotate={"models": {"aes": {"kind": "aesthetic_shadow", "model": "x"}}},
        policies={"default": {"groups": ["aesthetic"], "tiers": tiers, "tags": {"comparison": ">="}}},
    )
    compose(config, lab.workspace, policy="default")

    report = stats(config, lab.workspace, policy="default")

    assert [(it.word, it.count) for it in report.tables["aesthetic"]] == [("fine", 2), ("poor", 1), ("(none)", 1)]
    assert report.statuses == {"aes": {"ok": 3, "no_result": 1}}


def test_a_changed_threshold_from_the_command_line_needs_no_model(lab, dataset, capsys):
    place = ["--workspace", lab.workspace.root]
    run("annotate", dataset, *place)
    override = 'policies.default.tiers.aesthetic.steps=[[-1.0, "fine"]]'

    code = run("compose", dataset, *place, "--set", override)

    assert code == 0
    assert all(text.startswith("fine") for text in lab.texts())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "annotate.devise='cpu'"], "unknown key"),
        (["--set", "nonsense"], "expected key.path=value"),
        (["--part-index", "2", "--num-parts", "2"], "--part-index 2 is outside 0 … 1"),
        (["--models", "nope"], "model 'nope': unknown"),
    ],
)
def test_bad_usage_is_exit_code_2(lab, dataset, capsys, arguments, message):
    assert run("annotate", dataset, "--workspace", lab.workspace.root, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_config_or_subcommand_is_exit_code_2(capsys):
    assert run("annotate", "no-such.toml") == 2
    assert "no-such.toml: no such config file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2


def test_bad_data_is_exit_code_3_and_a_missing_workspace_1(lab, dataset, capsys):
    assert run("compose", dataset, "--workspace", lab.workspace.root) == 3
    assert "run `python -m captioning annotate" in capsys.readouterr().err
    assert run("annotate", dataset, "--workspace", lab.folder / "empty") == 1
    assert "run `python -m sharding dedupe` first" in capsys.readouterr().err
    lab.keep(lab.save(b"broken", lab.png(64, 64)))
    assert run("annotate", dataset, "--workspace", lab.workspace.root) == 3
    assert "max_broken_fraction" in capsys.readouterr().err


def test_another_distribution_with_the_same_import_name_is_named(monkeypatch, capsys):
    monkeypatch.setattr(
        cli, "packages_distributions", lambda: {"captioning": ["chunkline", "other-thing", "chunkline"]}
    )

    assert run("stats", "x.toml") == 2
    assert "other-thing also installs a package named captioning" in capsys.readouterr().err


def test_help_answers_in_under_a_second():
    started = time.monotonic()

    done = subprocess.run([sys.executable, "-m", "captioning", "annotate", "--help"], capture_output=True, text=True)

    assert done.returncode == 0 and "--dry-run" in done.stdout
    assert time.monotonic() - started < 1
