"""Repaired copies: what is written, that originals stay, and that a second run does nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.config import ConfigError
from tests.training.dreambooth.doctor.fix.pictures import painting
from training.cli import main
from training.config.concepts import ConceptConfig
from training.dreambooth.concepts.reading import import_concepts
from training.dreambooth.doctor.examination import examine
from training.dreambooth.doctor.fix.copies import write_copies
from training.dreambooth.doctor.rules import load_rules


@pytest.fixture
def concept(tmp_path):
    (tmp_path / "set").mkdir()
    return ConceptConfig(name="nagisa", folder=tmp_path / "set", prompt="a girl")


def fixed(concept, folder, *overrides, **more):
    return write_copies(examine([concept], load_rules(overrides=overrides)), folder, **more)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_exif_alpha_bars_and_size_are_repaired(concept, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    painting(400, 300).save(concept.folder / "turned.jpg", exif=exif)
    clear = painting()
    clear.putalpha(0)
    clear.save(concept.folder / "clear.png")
    letterbox = Image.new("RGB", (300, 500))
    letterbox.paste(painting(), (0, 50))
    letterbox.save(concept.folder / "bars.png")
    painting(960, 1280).save(concept.folder / "large.png")

    report = fixed(concept, tmp_path / "out")

    out = tmp_path / "out" / "nagisa"
    sizes = {path.name: Image.open(path).size for path in out.glob("*.png")}
    assert sizes == {
        "turned.png": (300, 400),
        "clear.png": (300, 400),
        "bars.png": (297, 396),
        "large.png": (810, 1080),
    }
    assert np.asarray(Image.open(out / "clear.png")).min() == 255
    assert np.asarray(Image.open(out / "bars.png").convert("L"))[0].max() > 40
    told = report.text()
    for words in (
        "turned as its EXIF says",
        "transparency laid on white",
        "top 52, bottom 52",
        "960x1280 brought down",
    ):
        assert words in told


def test_a_good_picture_is_copied_byte_by_byte_with_its_caption(concept, tmp_path):
    (concept.folder / "day").mkdir()
    painting().save(concept.folder / "day" / "a.b.jpg")
    (concept.folder / "day" / "a.b.txt").write_bytes(b"\xef\xbb\xbfnagisa, smile\r\n")

    fixed(concept, tmp_path / "out")

    for name in ("a.b.jpg", "a.b.txt"):
        copy = tmp_path / "out" / "nagisa" / "day" / name
        assert copy.read_bytes() == (concept.folder / "day" / name).read_bytes()


def test_a_second_run_writes_nothing_and_originals_are_never_touched(concept, tmp_path):
    painting().save(concept.folder / "a.png")
    painting(500, 700, seed=1).save(concept.folder / "b.png")
    before = tree(concept.folder)
    fixed(concept, tmp_path / "out", "fix.levels=beside")
    first = tree(tmp_path / "out")

    report = fixed(concept, tmp_path / "out", "fix.levels=beside")

    assert tree(tmp_path / "out") == first
    assert tree(concept.folder) == before
    assert not any(one.is_new for one in report.copied)


def test_what_changed_is_made_anew_and_what_is_gone_is_removed(concept, tmp_path):
    for seed, name in enumerate(("a", "b", "c")):
        painting(seed=seed).save(concept.folder / f"{name}.png")
    fixed(concept, tmp_path / "out")
    (concept.folder / "a.txt").write_text("nagisa")
    (concept.folder / "b.png").unlink()

    report = fixed(concept, tmp_path / "out")

    assert [Path(one.sources[0]).name for one in report.copied if one.is_new] == ["a.png"]
    assert report.removed == ("nagisa/b.png",)
    assert sorted(path.name for path in (tmp_path / "out" / "nagisa").iterdir()) == ["a.png", "a.txt", "c.png"]


def test_a_copy_that_somebody_changed_is_made_anew(concept, tmp_path):
    painting(301, 403).save(concept.folder / "a.png")
    fixed(concept, tmp_path / "out")
    copy = tmp_path / "out" / "nagisa" / "a.png"
    good = copy.read_bytes()
    copy.write_bytes(b"half")

    fixed(concept, tmp_path / "out")

    assert copy.read_bytes() == good


def test_levels_stand_beside_the_raw_one_or_take_its_place(concept, tmp_path):
    pale = painting().point(lambda level: level // 3 + 80)
    pale.save(concept.folder / "pale.png")
    (concept.folder / "pale.txt").write_text("nagisa")

    fixed(concept, tmp_path / "beside", "fix.levels=beside")
    fixed(concept, tmp_path / "replace", "fix.levels=replace")
    again = fixed(
        concept.model_copy(update={"folder": tmp_path / "beside" / "nagisa"}), tmp_path / "x", "fix.levels=beside"
    )

    names = {path.name for path in (tmp_path / "beside" / "nagisa").iterdir()}
    assert {"pale.png", "pale.txt", "pale-level.png", "pale-level.txt"} <= names
    assert (tmp_path / "beside" / "nagisa" / "pale.png").read_bytes() == (concept.folder / "pale.png").read_bytes()
    assert Image.open(tmp_path / "replace" / "nagisa" / "pale.png").getextrema() == ((0, 255),) * 3
    assert {path.name for path in (tmp_path / "x" / "nagisa").iterdir()} == names  # levels of levels are not made
    assert len(again.copied) == len([name for name in names if name.endswith(".png")])


def test_copies_with_levels_are_no_repeated_frames(concept, tmp_path):
    painting().save(concept.folder / "a.png")
    painting().point(lambda level: level // 2 + 60).save(concept.folder / "a-level.png")

    assert "repeated" not in {one.rule for one in examine([concept], load_rules()).findings}


def test_two_pictures_with_one_name_get_captions_of_their_own(concept, tmp_path):
    painting().save(concept.folder / "a.png")
    painting(seed=1).save(concept.folder / "a.jpg")
    painting(seed=2).save(concept.folder / "a-png.bmp")
    (concept.folder / "a.txt").write_text("nagisa")

    fixed(concept, tmp_path / "out")

    assert {path.name for path in (tmp_path / "out" / "nagisa").iterdir()} == {
        "a-png-2.png", "a-png-2.txt", "a-jpg.jpg", "a-jpg.txt", "a-png.bmp"
    }  # fmt: skip


def test_the_new_list_points_at_the_copies_and_keeps_all_else(concept, tmp_path):
    painting().save(concept.folder / "a.png")
    given = concept.model_copy(update={"repeats": 3, "token": "nagisa"})

    fixed(given, tmp_path / "out")

    (read,) = import_concepts(tmp_path / "out" / "concepts.toml").concepts
    assert read == given.model_copy(update={"folder": tmp_path / "out" / "nagisa"})


def test_broken_pictures_are_left_out_and_told(concept, tmp_path):
    (concept.folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    report = fixed(concept, tmp_path / "out")

    assert [(path.name, why[:11]) for path, why in report.left_out] == [("a.png", "undecodable")]
    assert "left out" in report.text()


def test_folders_with_originals_or_other_things_are_refused(concept, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    parent = concept.model_copy(update={"folder": tmp_path / "a" / "nagisa"})

    for one, folder, said in (
        (concept, concept.folder, "overlaps"),
        (concept, concept.folder / "fixed", "overlaps"),
        (parent, tmp_path / "a", "overlaps"),
        (concept, tmp_path / "other", "holds other files"),
        (concept, tmp_path / "other" / "mine.txt", "is a file"),
    ):
        with pytest.raises(ConfigError, match=said):
            fixed(one, folder)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_the_command_writes_copies_and_refuses_options_without_it(concept, tmp_path, capsys):
    painting().save(concept.folder / "a.png")
    given = ["doctor", str(tmp_path), "--levels", "replace"]

    alone = main(given)
    without = main(["doctor", str(tmp_path), "--fix", str(tmp_path / "out"), "--upscale", "1.5"])
    dry = main([*given, "--fix", str(tmp_path / "dry"), "--dry-run"])
    done = main([*given, "--fix", str(tmp_path / "out")])

    assert (alone, without, dry, done) == (2, 2, 3, 3)
    said = capsys.readouterr().err
    assert "give --fix DIR" in said
    assert "give --fix DIR --upscaler FILE.onnx" in said
    assert not (tmp_path / "dry").exists()
    assert json.loads((tmp_path / "out" / "fix.json").read_text())["settings"]["levels"] == "replace"
