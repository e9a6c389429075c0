"""The commands, as a user types them."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from sharding import cli
from sharding.schema import CAPTIONS, Workspace
from sharding.tables import part_name, read_parts, write_part

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, save, paint, capsys):
    """Return a function that runs a command over a small dataset: 6 pictures, one duplicate, one broken file."""
    for number in range(6):
        save(f"{number}.jpg", paint(number))
    save("copy.jpg", (tmp_path / "raw" / "0.jpg").read_bytes())
    save("broken.jpg", b"no picture")
    config = tmp_path / "test.toml"
    config.write_text(
        f'name = "t"\nmax_broken_fraction = 0.5\n[sources.photos]\nroot = {json.dumps(str(tmp_path / "raw"))}\n'
        "[filters]\nmin_pixels = 1\n[plan]\nchunk_size = 4\n"
    )

    def run_command(command, *arguments, key=()):
        workers = ["--workers", "0"] if command in ("scan", "pack", "verify") else []
        code = cli.main([command, *key, str(config), "--workspace", str(tmp_path / "ws"), *workers, *arguments])
        captured = capsys.readouterr()
        errors.append(captured.err)
        return code, captured.out

    errors: list[str] = []
    run_command.errors = errors
    return run_command


@pytest.fixture(autouse=True)
def _keep_logging():
    """Undo what a command does to the root logger, which outlives the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def write_captions(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    keys = read_parts(workspace.kept, ["key"]).column("key").to_pylist()
    rows = [{"key": key, "text": "solo", "groups": []} for key in keys]
    write_part(workspace.captions("default") / part_name(0), pa.Table.from_pylist(rows, schema=CAPTIONS), made_from="x")


def test_the_line_from_files_to_verified_chunks(run, tmp_path):
    assert run("scan")[0] == 0
    assert run("dedupe")[0] == 0
    assert run("plan")[0] == 0
    assert run("pack")[0] == 2  # no captions yet
    write_captions(tmp_path)
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

    # --- damage ---

    [tar, *_] = (tmp_path / "ws" / "chunks").rglob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    code, text = run("verify")
    assert code == 3 and "damaged" in text
    (tmp_path / "ws" / "plan" / "part-00000.parquet").write_bytes(b"damaged")
    assert run("pack")[0] == 3


def test_wrong_usage_and_wrong_settings_end_with_2(run, tmp_path):
    assert run("scan", "--set", "plan.chunk_size=0")[0] == 2
    assert "plan.chunk_size" in run.errors[-1]
    assert run("report")[0] == 2  # no workspace
    assert run("scan", "--part-index", "4")[0] == 2
    assert cli.main(["plan", str(tmp_path / "none.toml")]) == 2
    assert cli.main(["frobnicate"]) == 2
    assert run("show", key=["zz"])[0] == 2


def test_an_unexpected_error_ends_with_1_and_its_traceback(run, monkeypatch):
    assert run("scan")[0] == 0
    monkeypatch.setattr("sharding.report.make_report", lambda *_: 1 / 0)

    assert run("report")[0] == 1
    assert "ZeroDivisionError" in run.errors[-1]


def test_a_dry_run_of_every_stage_writes_nothing(run, tmp_path):
    assert run("scan", "--dry-run")[0] == 0
    assert not (tmp_path / "ws" / "manifest").exists()


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
