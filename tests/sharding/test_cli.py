"""The commands, as a user types them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding import cli
from sharding.schema import Workspace
from sharding.tables import read_parts

ROOT = Path(__file__).parents[2]


def test_the_line_from_files_to_verified_chunks(run, write_captions, tmp_path):
    assert run("scan")[0] == 0
    assert run("dedupe")[0] == 0
    assert run("plan")[0] == 0
    assert run("pack")[0] == 2  # no captions yet
    write_captions()
    assert run("pack")[0] == 0
    assert run("combine")[0] == 0

    assert run("verify") == (0, "no problems\n")
    code, text = run("report")
    assert code == 0
    assert text.splitlines()[0] == "t: 8 files = 6 packed + 2 dropped"
    report = json.loads(run("report", "--json")[1])
    assert report["adds_up"] and report["num_packed"] == 6
    key = read_parts(Workspace(tmp_path / "ws").kept, ["key"]).column("key")[0].as_py()
    assert f"{key}  packed in " in run("show", key=[key[:10]])[1]
    assert json.loads(run("show", "--json", key=[key])[1])[0]["key"] == key


def test_an_unexpected_error_ends_with_1_and_its_traceback(run, monkeypatch):
    assert run("scan")[0] == 0
    monkeypatch.setattr("sharding.report.make_report", lambda *_, **__: 1 / 0)

    assert run("report")[0] == 1
    assert "ZeroDivisionError" in run.err


def test_every_stage_says_in_a_few_lines_what_it_found_and_did(run, write_captions):
    assert (
        run("scan")[1] == "8 files: 7 kept, 1 dropped\n  1 not_an_image\n1 parts made, 0 current\n8 new files listed\n"
    )
    assert run("scan")[1].endswith("0 parts made, 1 current\n")
    assert run("dedupe")[1] == (
        "7 files: 6 kept, 1 dropped in 1 groups\n  1 identical_bytes\n"
        "the pairs of 6 new pictures were searched\n"
        "1 parts of dedupe/kept written, the others are current\n"
    )
    assert run("dedupe")[1].endswith("everything is current\n")
    assert run("plan")[1].endswith("6 new keys planned\n")
    assert run("plan")[1].endswith("the plan is current\n")
    write_captions()
    assert run("pack")[1] == "2 chunks packed (6 samples), 0 current\n"
    assert run("pack")[1] == "0 chunks packed (0 samples), 2 current\n"


def test_a_dry_run_of_every_stage_says_so_and_writes_nothing(run, write_captions, tmp_path):
    workspace = tmp_path / "ws"
    assert run("scan", "--dry-run") == (0, "1 parts would be made, 0 current\n8 new files would be listed\n")
    assert not workspace.exists()
    for stage in ("scan", "dedupe", "plan", "pack", "combine"):
        if stage == "pack":
            write_captions()
        before = set(workspace.rglob("*"))
        code, text = run(stage, "--dry-run")
        assert code == 0 and ("--dry-run" in text or "would be" in text)
        assert set(workspace.rglob("*")) == before
        assert run(stage)[0] == 0


def test_a_second_distribution_with_our_name_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"sharding": ["chunkline", "other-wheel"]})

    assert cli.main(["--help"]) == 2
    assert "claimed by chunkline and other-wheel" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "pack", "verify"])
def test_help_answers_in_under_a_second_without_heavy_imports(command):
    program = (
        "import sys\nfrom sharding.cli import main\n"
        f"code = main([*{[command] if command else []}, '--help'])\n"
        "heavy = {'pyarrow', 'numpy', 'duckdb', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "sys.exit(code or (5 if heavy else 0))"
    )
    started = time.monotonic()

    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode == 0
    assert time.monotonic() - started < 1.5


def test_python_dash_m_works():
    result = subprocess.run([sys.executable, "-m", "sharding", "--help"], cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 0
    assert "combine" in result.stdout
