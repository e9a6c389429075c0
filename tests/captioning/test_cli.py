"""Exit codes, help and the whole line from kept parts to tables of counts."""

import signal
import subprocess
import sys
import time

import pytest

from captioning import cli
from sharding.tables import part_name

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


# --- bad input: one clear line on stderr, the right exit code ---


def the_error(capsys):
    """Return the one line that says what is wrong."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines), lines
    return errors[0]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "annotate",
            ["--set", "annotate.devise='cpu'"],
            "annotate.devise: unknown key; known here: batch_size, device",
        ),
        ("annotate", ["--set", "annotate.models.wd.modle='x'"], "annotate.models.wd.modle: unknown key"),
        ("annotate", ["--set", "nonsense"], "expected key.path=value"),
        ("annotate", ["--part-index", "2", "--num-parts", "2"], "--part-index 2 is outside 0 … 1"),
        ("annotate", ["--models", "nope"], "model 'nope': unknown; annotate.models has wd, aesthetic"),
        ("annotate", ["--workers", "-1"], "workers must be 0 or more, got -1"),
        (
            "annotate",
            ["--set", "annotate.models.wd.model='no/such/place'"],
            "annotate.models.wd: model = 'no/such/place'",
        ),
        ("compose", ["--policy", "nope"], "policy 'nope': unknown; the dataset has default"),
        ("stats", ["--policy", "nope"], "policy 'nope': unknown; the dataset has default"),
        ("stats", [], "run `python -m captioning compose --policy default` first"),
    ],
)
def test_bad_usage_is_exit_code_2(lab, dataset, capsys, command, arguments, message):
    assert run(command, dataset, "--workspace", lab.workspace.root, *arguments) == 2
    assert message in the_error(capsys)


def test_a_missing_config_or_subcommand_is_exit_code_2(capsys):
    assert run("annotate", "no-such.toml") == 2
    assert "no-such.toml: no such config file" in the_error(capsys)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2


def test_a_missing_file_of_a_model_says_which_key_of_the_config_names_it(lab, dataset, demo_models, capsys):
    quality = f"kind = 'aes_b32', clip = '{demo_models['clip']}', head = '{lab.folder / 'absent.pth'}'"

    code = run(
        *("annotate", dataset, "--workspace", lab.workspace.root),
        *("--set", f"annotate.models.quality={{{quality}}}", "--models", "quality"),
    )

    assert code == 2
    assert "annotate.models.quality: head = " in (error := the_error(capsys)) and "absent.pth': no such file" in error


def test_without_onnxruntime_the_extra_that_brings_it_is_named(lab, dataset, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    assert run("annotate", dataset, "--workspace", lab.workspace.root) == 2
    assert "annotate.models.wd: onnxruntime is not installed: run `pip install -e '.[caption,cpu]'`" in the_error(
        capsys
    )


@pytest.mark.parametrize("command", ["annotate", "compose"])
def test_before_dedupe_has_run_the_error_names_it(lab, dataset, capsys, command):
    assert run(command, dataset, "--workspace", lab.folder / "empty") == 2
    assert "run `python -m sharding dedupe` first" in the_error(capsys)


def test_composing_before_annotating_names_the_model_and_is_exit_code_3(lab, dataset, capsys):
    assert run("compose", dataset, "--workspace", lab.workspace.root) == 3
    assert "run `python -m captioning annotate --models aesthetic` first" in the_error(capsys)


def test_a_picture_that_vanished_is_counted_and_has_a_row_with_the_reason(lab, dataset, capsys):
    gone = sorted(lab.pictures.iterdir())[1]
    gone.unlink()

    code = run("annotate", dataset, "--workspace", lab.workspace.root, "--models", "wd")

    output = capsys.readouterr()
    assert code == 0 and "no result, unreadable: 1" in output.out
    assert f"{gone.stem}  {gone.name}: unreadable" in output.err
    assert {key: row["status"] for key, row in lab.rows("wd").items() if row["status"] != "ok"} == {
        gone.stem: "unreadable"
    }
    events = lab.workspace.events.read_text()
    assert f'"event": "no_result", "key": "{gone.stem}"' in events


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_what_to_do(lab, dataset, monkeypatch, capsys, sent):
    monkeypatch.setattr(cli, "_run", lambda *_: signal.raise_signal(sent))
    before = signal.getsignal(signal.SIGTERM)
    background = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind `&` ignores it

    try:
        assert run("annotate", dataset, "--workspace", lab.workspace.root) == 1
    finally:
        signal.signal(signal.SIGINT, background)
    assert the_error(capsys) == "error: stopped; finished parts stay, run the same command again"
    assert signal.getsignal(signal.SIGTERM) == before


def test_too_many_broken_pictures_are_exit_code_3(lab, dataset, capsys):
    lab.keep(lab.save(b"broken", lab.png(64, 64)))

    code = run("annotate", dataset, "--workspace", lab.workspace.root, "--set", "max_broken_fraction=0.01")

    assert code == 3
    assert "1 of 2 images up to here have no result, more than max_broken_fraction = 0.01" in the_error(capsys)


def test_a_damaged_part_is_named_and_exit_code_3(lab, dataset, capsys):
    place = [dataset, "--workspace", lab.workspace.root]
    assert run("annotate", *place) == 0
    kept, scores = (folder / part_name(0) for folder in (lab.workspace.kept, lab.workspace.annotations("aesthetic")))
    scores.write_bytes(scores.read_bytes()[:100])
    capsys.readouterr()

    assert run("compose", *place) == 3
    assert f"{scores}: not a readable part" in the_error(capsys)

    assert run("annotate", *place) == 0
    kept.write_bytes(kept.read_bytes()[:100])
    for command in ("annotate", "compose"):
        assert run(command, *place) == 3
        assert f"{kept}: not a readable part" in the_error(capsys)


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
