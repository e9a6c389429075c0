import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts.bench import scan
from scripts.bench.__main__ import main


@pytest.fixture(autouse=True)
def _small_and_alone(monkeypatch):
    monkeypatch.setattr(scan, "_SIZE", (400, 300))
    monkeypatch.delenv(scan.CZKAWKA_PYTHON, raising=False)


def test_every_kind_of_picture_is_made_and_the_same_each_time(tmp_path):
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files = scan.make_pictures(tmp_path / name, scan._DEMO, num_pictures=3)
        contents.append([path.read_bytes() for paths in files.values() for path in paths])

    assert {kind: len(paths) for kind, paths in files.items()} == {
        "baseline": 3, "grainy": 2, "progressive": 2, "png": 2,
    }  # fmt: skip
    assert contents[0] == contents[1]
    for kind, paths in files.items():
        with Image.open(paths[0]) as image:
            assert sorted(image.size) == [300, 400]
            assert bool(image.info.get("progressive")) == (kind == "progressive")


def test_a_small_run_gives_all_figures_and_no_verdict(monkeypatch):
    monkeypatch.setattr(scan, "find_czkawka", lambda: None)

    result = scan.run(full=False, data=None)

    assert {"ratio_baseline", "ratio_grainy", "ratio_progressive", "ratio_png", "bits_of_256_p99"} <= set(
        result.figures
    )
    assert {bar.figure for bar in result.bars} <= set(result.figures)
    assert result.met is None and any(scan.CZKAWKA_PYTHON in note for note in result.notes)
    assert result.figures["bits_of_64_max"] <= 4 and 0 < result.figures["decoder_fraction_baseline"] < 1


def test_czkawka_is_found_through_the_environment_variable_or_not_at_all(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))

    assert scan.find_czkawka() is None
    monkeypatch.setenv(scan.CZKAWKA_PYTHON, str(python))
    assert scan.find_czkawka() == str(python)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(ValueError, match="no pictures"):
        scan.run(full=False, data=Path(tmp_path))
    with pytest.raises(SystemExit):
        main(["scan", "--data", str(tmp_path / "none")])
