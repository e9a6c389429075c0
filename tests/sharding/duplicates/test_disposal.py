import os
import shutil
import tarfile

import pytest

from sharding.dedupe import dedupe
from sharding.duplicates.disposal import dispose
from sharding.duplicates.journal import DisposalError, undo
from sharding.scan import scan


@pytest.fixture
def line(save, paint, make_config, workspace, tmp_path):
    """Two sources, deduped: of picture 0 an identical and a smaller copy, of picture 1 a copy in a tar."""
    save("a/0.png", paint(0, 400, 300))
    save("a/1.png", paint(1, 400, 300))
    save("b/deep/same.png", (tmp_path / "raw/a/0.png").read_bytes())
    save("b/small.jpg", paint(0, 400, 300).resize((200, 150)))
    (tmp_path / "raw/t").mkdir()
    with tarfile.open(tmp_path / "raw/t/x.tar", "w") as tar:
        tar.add(tmp_path / "raw/a/1.png", "1.png")
    sources = {
        "a": {"root": str(tmp_path / "raw/a"), "priority": 1},
        "b": {"root": str(tmp_path / "raw/b")},
        "tars": {"root": str(tmp_path / "raw/t"), "importer": "webdataset"},
    }
    config = make_config(sources=sources)
    scan(config, workspace, workers=0)
    dedupe(config, workspace)
    return config, workspace


def listing(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_dry_run_touches_nothing(line, tmp_path):
    before = listing(tmp_path / "raw")

    report = dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv")

    assert report.counts == {"identical_bytes": 1, "near_duplicate": 1} and report.is_dry_run
    assert listing(tmp_path / "raw") == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "j.csv").exists()


@pytest.mark.parametrize("action", ["move", "trash", "hardlink"])
def test_what_is_done_can_be_undone(line, tmp_path, monkeypatch, action):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    before = listing(tmp_path / "raw")
    folder = tmp_path / "out" if action == "move" else None

    report = dispose(*line, action=action, folder=folder, journal=tmp_path / "j.csv", dry_run=False)

    same = tmp_path / "raw/b/deep/same.png"
    assert report.counts["identical_bytes"] == 1
    if action == "hardlink":
        assert report.counts == {"identical_bytes": 1} and same.samefile(tmp_path / "raw/a/0.png")
    else:
        assert not same.exists() and not (tmp_path / "raw/b/small.jpg").exists()
    if action == "move":
        assert sorted(listing(tmp_path / "out")) == ["b/deep/same.png", "b/small.jpg"]
    if action == "trash":
        assert sorted(listing(tmp_path / "home/Trash")) == [
            "files/same.png", "files/small.jpg", "info/same.png.trashinfo", "info/small.jpg.trashinfo",
        ]  # fmt: skip
        assert f"Path={tmp_path}/raw/b/deep/same.png" in (
            tmp_path / "home/Trash/info/same.png.trashinfo"
        ).read_text()  # fmt: skip

    assert undo(tmp_path / "j.csv").is_dry_run
    back = undo(tmp_path / "j.csv", dry_run=False)

    assert back.counts == report.counts and not back.skipped
    assert listing(tmp_path / "raw") == before
    assert not same.samefile(tmp_path / "raw/a/0.png")
    assert undo(tmp_path / "j.csv", dry_run=False).counts == {}  # a second time there is nothing to do


def test_members_of_tars_are_left_alone(line, tmp_path):
    report = dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv", dry_run=False)

    assert report.skipped == ("tars/x.tar/1.png: it is gone, or is in a tar",)


def test_a_file_that_has_changed_or_whose_keeper_has_is_left_alone(line, tmp_path):
    (tmp_path / "raw/b/small.jpg").write_bytes(b"another picture")
    report = dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv", dry_run=False)
    assert report.counts == {"identical_bytes": 1}
    assert any("b/small.jpg: has changed" in line for line in report.skipped)
    undo(tmp_path / "j.csv", dry_run=False)

    (tmp_path / "raw/a/0.png").write_bytes(b"not the keeper any more")
    report = dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "k.csv", dry_run=False)
    assert report.counts == {} and (tmp_path / "raw/b/deep/same.png").exists()

    (tmp_path / "raw/a/0.png").unlink()
    report = dispose(*line, action="trash", journal=tmp_path / "l.csv", dry_run=False)
    assert report.counts == {} and (tmp_path / "raw/b/deep/same.png").exists()


def test_links_and_taken_places_are_left_alone(line, tmp_path):
    same = tmp_path / "raw/b/deep/same.png"
    same.unlink()
    same.symlink_to(tmp_path / "raw/a/0.png")
    (tmp_path / "out/b").mkdir(parents=True)
    (tmp_path / "out/b/small.jpg").write_bytes(b"mine")

    report = dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv", dry_run=False)

    assert report.counts == {} and same.is_symlink()
    assert (tmp_path / "out/b/small.jpg").read_bytes() == b"mine"
    assert any("no plain file" in line for line in report.skipped)
    assert any("exists already" in line for line in report.skipped)


def test_a_file_that_two_sources_hold_is_never_taken_for_its_own_copy(save, paint, make_config, workspace, tmp_path):
    save("deep/0.png", paint(0))
    sources = {"all": {"root": str(tmp_path / "raw")}, "deep": {"root": str(tmp_path / "raw/deep")}}
    config = make_config(sources=sources)
    scan(config, workspace, workers=0)
    assert dedupe(config, workspace).dropped == {"identical_bytes": 1}

    report = dispose(
        config, workspace, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv", dry_run=False
    )

    assert report.counts == {} and "two sources hold the same folder" in report.skipped[0]
    assert (tmp_path / "raw/deep/0.png").exists()


def test_a_cut_journal_is_read_and_undo_goes_by_what_it_finds(line, tmp_path):
    dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv", dry_run=False)
    with (tmp_path / "j.csv").open("a") as stream:
        stream.write("move,/half/of/a/li")
    shutil.copy(tmp_path / "out/b/small.jpg", tmp_path / "raw/b/small.jpg")  # the user has put one back

    report = undo(tmp_path / "j.csv", dry_run=False)

    assert report.counts == {"identical_bytes": 1}
    assert report.skipped == (f"{tmp_path}/raw/b/small.jpg: is there again",)


def test_to_another_disk_files_are_copied_and_compared(line, tmp_path, monkeypatch):
    def no_links(*_args, **_options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)

    report = dispose(*line, action="move", folder=tmp_path / "out", journal=tmp_path / "j.csv", dry_run=False)

    assert sum(report.counts.values()) == 2
    assert not (tmp_path / "raw/b/small.jpg").exists() and (tmp_path / "out/b/small.jpg").exists()


def test_wrong_arguments_and_stale_tables_are_refused(line, tmp_path, save, paint):
    config, workspace = line
    with pytest.raises(DisposalError, match="--reason too_small: must be one of identical_bytes"):
        dispose(*line, action="trash", reasons=["too_small"], journal=tmp_path / "j.csv")
    with pytest.raises(DisposalError, match="only for it"):
        dispose(*line, action="move", journal=tmp_path / "j.csv")
    (tmp_path / "j.csv").write_text("x")
    with pytest.raises(DisposalError, match="exists"):
        dispose(*line, action="trash", journal=tmp_path / "j.csv")
    with pytest.raises(DisposalError, match="no journal"):
        undo(tmp_path / "j.csv")

    save("a/new.png", paint(5))
    scan(config, workspace, workers=0)
    with pytest.raises(DisposalError, match="run `python -m sharding dedupe` first"):
        dispose(*line, action="trash", journal=tmp_path / "k.csv")
