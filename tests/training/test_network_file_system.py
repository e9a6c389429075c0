"""States where the file system is NFS: names of open files that stay, listings of yesterday, strict renames."""

import errno
import os
from pathlib import Path

import pytest
import torch

from sharding.files import TEMPORARY_MARK
from training.kept_states import remove_partials, retain
from training.run_dir import RunDir
from training.state import StateSaver, take_snapshot
from training.state_folder import newest_verified
from training.state_manifest import read_manifest


def save(folder: Path, step: int, **options) -> Path:
    saver = StateSaver(asynchronous=False, check=lambda: None, **options)
    tensors = {"model": {"weight": torch.full((100,), float(step))}}
    saver.save(folder, take_snapshot(tensors, {"global_step": step}))
    return folder


@pytest.fixture
def open_files(monkeypatch):
    """Return a set: a file whose name is in it is open somewhere, so that removing it gives it another name."""
    names: set[str] = set()
    unlink, number = os.unlink, iter(range(1000))

    def silly_rename(path, *, dir_fd=None):
        if Path(path).name not in names:
            return unlink(path, dir_fd=dir_fd)
        os.rename(path, f".nfs{next(number):08x}", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        return None

    monkeypatch.setattr(os, "unlink", silly_rename)
    return names


def test_an_old_state_of_which_a_file_is_open_goes_later(tmp_path, open_files, caplog):
    old, new = tmp_path / "state-00000001", tmp_path / "state-00000002"
    save(old, 1)
    open_files.add("model.safetensors")

    save(new, 2, keep_last=1)

    assert "is still open in a process" in caplog.text
    assert not old.exists() and newest_verified([new])[0] == new
    (left,) = tmp_path.glob(f"*{TEMPORARY_MARK}*")
    assert [path.name[:4] for path in left.iterdir()] == [".nfs"]
    open_files.clear()
    assert remove_partials(tmp_path) == [left] and not left.exists()


def test_a_folder_is_never_renamed_over_another(tmp_path, monkeypatch):
    replace = os.replace

    def strict(source, target):
        if Path(target).is_dir():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", strict)

    for step in (1, 2, 3):
        save(tmp_path / "final", step)

    assert read_manifest(tmp_path / "final").global_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_listing_that_still_shows_what_is_gone_costs_nothing(tmp_path, monkeypatch, caplog):
    run_dir = RunDir(tmp_path)
    folder = run_dir.chunk_folder("newest/0000")
    save(folder / "state-00000001", 1)
    save(folder / "state-00000002", 2)
    listed = list(folder.iterdir())
    iterdir = Path.iterdir
    ghosts = [folder / "state-00000003", folder / f"state-00000003{TEMPORARY_MARK}1"]
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([*listed, *ghosts]) if path == folder else iterdir(path))

    newest, _ = newest_verified([*run_dir.state_folders("newest/0000"), ghosts[0]])
    removed = retain(folder, keep_last=1)

    assert newest.name == "state-00000002"
    assert [path.name for path in removed] == ["state-00000001"]
    assert "state-00000003" in caplog.text  # said aloud, and passed over
