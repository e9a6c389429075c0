import errno
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sharding.files import DiskFullError
from tests.training.toy import toy_config
from training.exports import write_export
from training.forecast import DiskForecast, export_bytes
from training.optimizer_state import optimizer_tensors
from training.optimizers import make_optimizer
from training.recipes.base import ExportFile
from training.room import forecast_of, require_room, require_room_for_export

Usage = namedtuple("Usage", "total used free")
FORECAST = DiskForecast(
    num_states=3, state_bytes=100, num_exports=1, export_bytes=50, preview_bytes=0, record_bytes=0
)  # fmt: skip


def free(monkeypatch, num_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - num_bytes, num_bytes))


@pytest.mark.parametrize(
    "num_present, exports, needed",
    [(0, False, 300), (0, True, 350), (2, True, 150), (5, True, 150)],  # keep 2 and the one being written
)
def test_states_and_the_export_behind_them_must_fit(tmp_path, monkeypatch, num_present, exports, needed):
    settings = {"keep_states": 2, "num_present": num_present, "exports": exports}
    free(monkeypatch, needed)
    line = require_room(tmp_path, FORECAST, **settings)
    free(monkeypatch, needed - 1)

    with pytest.raises(DiskFullError, match=r"needs .* in .*: free some space or choose another folder"):
        require_room(tmp_path, FORECAST, **settings)

    assert "a state takes" in line


def test_an_export_must_fit_when_its_turn_has_come(tmp_path, monkeypatch):
    free(monkeypatch, 50)
    require_room_for_export(tmp_path, FORECAST)
    free(monkeypatch, 49)

    with pytest.raises(DiskFullError, match="the chunk's final state is saved"):
        require_room_for_export(tmp_path, FORECAST)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_before_its_first_step_an_optimizer_is_counted_with_what_it_will_hold(tmp_path, name):
    module = nn.Linear(300, 200)
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = make_optimizer(name, {"network": module.parameters()}, learning_rates={"network": 0.1})
    config = toy_config(optimizer={"name": name})
    (tmp_path / "index").touch()
    run_dir, chunk = SimpleNamespace(read_run_json=dict), SimpleNamespace(name="a", index_path=tmp_path / "index")

    def foreseen():
        tensors = {"model": module.state_dict(), "optimizer": optimizer_tensors(optimizer, names)[0]}
        updated = set(names.values())
        return forecast_of(config, run_dir, chunk=chunk, plans=[], tensors=tensors, updated=updated, prompts=[])

    before = foreseen()
    module(torch.ones(1, 300)).sum().backward()
    optimizer.step()

    assert before.state_bytes == pytest.approx(foreseen().state_bytes, rel=0.02)
    assert before.state_bytes >= foreseen().state_bytes


def test_every_format_takes_its_own():
    one = toy_config().save
    two = toy_config(save={"export_formats": ("original", "diffusers")}).save

    assert export_bytes(1000, 0, save=one) == 2000
    assert export_bytes(1000, 0, save=two) == 4000


# --- writing an export ---


def export(folder):
    """Two files and a folder."""
    (folder / "prior").mkdir()
    paths = [folder / "network.bin", folder / "prior" / "model.bin"]
    for path in paths:
        path.write_bytes(b"new")
    return [ExportFile(path) for path in paths]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_replaces_what_was_there_and_says_where_its_files_are(tmp_path):
    folder = tmp_path / "weights"
    (folder / "prior").mkdir(parents=True)
    for name in ("network.bin", "prior/model.bin", "prior/old.bin", "notes.txt"):
        (folder / name).write_bytes(b"old")

    files = write_export(folder, export)

    assert [file.path for file in files] == [folder / "network.bin", folder / "prior" / "model.bin"]
    assert contents(folder) == {"network.bin": b"new", "prior/model.bin": b"new", "notes.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_disk_that_fills_in_the_middle_leaves_no_half_export(tmp_path, is_there):
    folder = tmp_path / "weights"
    if is_there:
        folder.mkdir()
        (folder / "network.bin").write_bytes(b"old")

    def fill(partial):
        export(partial)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError, match=f"disk full while writing {folder}"):
        write_export(folder, fill)

    assert contents(tmp_path) == ({"weights/network.bin": b"old"} if is_there else {})
    assert sorted(path.name for path in tmp_path.iterdir()) == (["weights"] if is_there else [])


def test_what_a_stop_left_of_an_export_is_no_hindrance(tmp_path):
    def die(partial):
        export(partial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(tmp_path / "weights", die)

    assert contents(tmp_path) == {}
    assert len(write_export(tmp_path / "weights", export)) == 2
