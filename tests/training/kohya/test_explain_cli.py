"""`python -m training explain-kohya`: what it prints, writes and refuses."""

import io
import json
import sys
import tomllib
from pathlib import Path

import pytest

from sharding.config import load_config
from training.cli import main
from training.config import RunConfig

SEED_FILE = Path(__file__).with_name("seed_command.sh")
SEED = SEED_FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("way", ["argument", "file", "pipe"])
def test_the_command_may_come_in_three_ways(tmp_path, capsys, monkeypatch, way):
    monkeypatch.setenv("COLUMNS", "160")  # the width of a table that breaks no flag
    words = {"argument": [SEED], "file": ["--file", str(SEED_FILE)], "pipe": []}[way]
    monkeypatch.setattr(sys, "stdin", io.StringIO(SEED))
    output = tmp_path / "run.toml"

    code = main(["explain-kohya", *words, "--output", str(output), "--workspace", "ws", "--chunks", "mine/*"])
    told = capsys.readouterr()

    assert code == 0
    config = load_config(output, RunConfig)
    assert str(config.data.workspace) == "ws" and config.data.chunks == ("mine/*",)
    assert "--learning_rate_te1 1e-05" in told.out
    assert "Without a flag, kohya does this, too:" in told.out
    assert f"written: {output}" in told.err
    assert f"python -m training run {output} " in told.out


def test_the_table_has_no_line_that_is_too_long(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    assert main(["explain-kohya", "--file", str(SEED_FILE)]) == 0

    table = capsys.readouterr().out.partition("Commands:")[0]
    assert max(map(len, table.splitlines())) <= 120


def test_json_says_the_same(capsys):
    assert main(["explain-kohya", "--file", str(SEED_FILE), "--json"]) == 0

    values = json.loads(capsys.readouterr().out)
    assert {"flag": "--full_fp16", "value": ""}.items() <= next(
        row for row in values["rows"] if row["flag"] == "--full_fp16"
    ).items()
    assert values["unknown"] == []


def test_unknown_flags_are_an_error_only_when_strict(tmp_path, capsys):
    command = f"{SEED.strip()} --strange 1"

    assert main(["explain-kohya", command]) == 0
    assert "--strange 1" in capsys.readouterr().out.partition("Not known here:")[2]
    assert main(["explain-kohya", command, "--strict"]) == 2


def test_nothing_is_written_over_or_by_a_dry_run(tmp_path, capsys):
    output = tmp_path / "run.toml"

    assert main(["explain-kohya", SEED, "--output", str(output), "--dry-run"]) == 0
    assert not output.exists()
    output.write_text("mine")
    assert main(["explain-kohya", SEED, "--output", str(output)]) == 2
    assert output.read_text() == "mine"
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python train_db.py --resolution 512", "--output", "x.toml"], "--pretrained_model_name_or_path: is missing"),
        (
            [SEED.replace("relative_step=False", "relative_step=True"), "--output", "x.toml"],
            "relative_step=True is not",
        ),
        ([SEED, "--output", "x.toml", "--set", "buckets.step=48"], "buckets.step 48 must be a multiple of 32"),
        ([SEED, "--file", "x.sh"], "COMMAND and --file exclude each other"),
        (["--file", "nothing.sh"], "nothing.sh: no such file"),
        (["--config-file", "nothing.toml"], "nothing.toml: no such config file"),
        ([SEED, "--config-file", "c.toml"], "--config-file stands for a command"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)

    code = main(["explain-kohya", *words])

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "x.toml").exists()


def test_the_file_names_the_flag_of_every_value(tmp_path):
    output = tmp_path / "run.toml"
    main(["explain-kohya", SEED, "--output", str(output)])

    lines = output.read_text().splitlines()

    tables = tomllib.loads(output.read_text())
    assert tables["optimizer"]["name"] == "adafactor"
    assert 'name = "adafactor"  # --optimizer_type' in lines
    assert 'weights = "fp16"  # --full_fp16: safer: fp32' in lines
    assert "seed = 0  # without --seed: kohya: random in every process" in lines
