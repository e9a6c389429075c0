import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file

from sharding.files import DiskFullError
from training import kept_states
from training.kept_states import remove_partials, retain
from training.state import StateSaver, check_room, state_bytes, take_snapshot
from training.state_folder import load_state, newest_verified
from training.state_manifest import StateError, verify_state
from training.tensor_file import shapes_of


def allow():
    """Stand for a lock that is held."""


def snapshot_of(step, *, size=64):
    model = {"weight": torch.full((size, 4), float(step)), "bias": torch.arange(4, dtype=torch.bfloat16)}
    return take_snapshot({"model": model, "optimizer": {"step/weight": torch.tensor(step)}}, {"global_step": step})


def save(folder, step, **options):
    saver = StateSaver(asynchronous=False, check=allow, **options)
    saver.save(folder, snapshot_of(step))
    return folder


def flip_byte(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- snapshots ---


def test_a_snapshot_is_a_contiguous_copy_that_later_steps_do_not_change():
    base = torch.arange(12.0).reshape(3, 4)
    views = {"all": base, "column": base[:, 1], "turned": base.T, "same": base, "scalar": base[0, 0]}

    snapshot = take_snapshot({"model": views}, {"global_step": 1})
    expected = {name: tensor.clone() for name, tensor in views.items()}
    base.zero_()

    copies = snapshot.tensors["model"]
    assert all(torch.equal(copies[name], expected[name]) and copies[name].is_contiguous() for name in views)
    assert len({copy.data_ptr() for copy in copies.values()}) == len(views)
    assert state_bytes(snapshot) == 4 * (12 + 3 + 12 + 12 + 1)


@pytest.mark.parametrize(
    "facts", [{}, {"global_step": -1}, {"global_step": 1.0}, {"global_step": 1, "x": float("nan")}]
)
def test_facts_need_a_step_and_strict_json(facts):
    with pytest.raises(StateError, match="state facts"):
        take_snapshot({}, facts)


# --- saving and loading ---


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_loads_as_it_was_saved(tmp_path, asynchronous):
    saved = []
    saver = StateSaver(
        asynchronous=asynchronous, check=allow, on_saved=lambda *what: saved.append((threading.current_thread(), *what))
    )
    folder = tmp_path / "chunk" / "state-00000007"
    facts = {"global_step": 7, "chunk": "newest/0005", "table": [0.1 + 0.2, 1e-300]}
    tensors = {"model": {"a": torch.randn(3, 2).bfloat16(), "b": torch.tensor(True)}, "ema": {}}

    saver.save(folder, take_snapshot(tensors, facts))
    returned = saver.drain()

    assert returned == (folder if asynchronous else None)
    assert saved == [(threading.main_thread(), folder, verify_state(folder).digest)]
    state = load_state(folder)
    assert state.facts == facts
    assert set(state.components) == {"ema", "model"}
    model = state.component("model")
    assert model["a"].dtype == torch.bfloat16
    assert torch.equal(model["a"], tensors["model"]["a"])
    assert torch.equal(model["b"], tensors["model"]["b"])
    assert state.component("ema") == {}
    assert set(load_file(folder / "model.safetensors")) == {"a", "b"}
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_an_asynchronous_save_returns_before_it_is_written_and_reports_on_the_main_thread(tmp_path, monkeypatch):
    go, saved = threading.Event(), []
    publish = kept_states.publish
    monkeypatch.setattr("training.state.publish", lambda *paths: (go.wait(10), publish(*paths)))
    saver = StateSaver(asynchronous=True, check=allow, on_saved=lambda folder, digest: saved.append(folder))

    saver.save(tmp_path / "state-00000001", snapshot_of(1))
    assert saver.poll() is None
    assert not (tmp_path / "state-00000001").exists()
    go.set()
    while saver.poll() is None:
        time.sleep(0.01)

    assert saved == [tmp_path / "state-00000001"]
    assert saver.drain() is None
    assert saved == [tmp_path / "state-00000001"]


def test_the_save_before_is_drained_first(tmp_path):
    saved = []
    saver = StateSaver(asynchronous=True, check=allow, on_saved=lambda folder, digest: saved.append(folder.name))

    for step in range(5):
        saver.save(tmp_path / f"state-{step}", snapshot_of(step))
    saver.drain()

    assert saved == [f"state-{step}" for step in range(5)]


def test_a_full_disk_is_reported_with_the_path_and_leaves_the_older_state(tmp_path, monkeypatch):
    save(tmp_path / "state-00000001", 1)
    saver = StateSaver(asynchronous=True, check=allow)
    write, written = os.write, []

    def fill_up(descriptor, data):
        written.append(len(data))
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fill_up)
    saver.save(tmp_path / "state-00000002", snapshot_of(2))
    with pytest.raises(DiskFullError, match=r"disk full while writing .*state-00000002.*model\.safetensors"):
        saver.drain()
    monkeypatch.undo()

    assert [path.name for path in tmp_path.iterdir()] == ["state-00000001"]
    assert newest_verified(tmp_path.iterdir())[0].name == "state-00000001"
    saver.save(tmp_path / "state-00000003", snapshot_of(3))
    assert saver.drain() == tmp_path / "state-00000003"


def test_a_real_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        save(disk / "state-00000001", 1)
        with pytest.raises(DiskFullError, match="state-00000002"):
            StateSaver(asynchronous=False, check=allow).save(disk / "state-00000002", snapshot_of(2, size=100_000))
        assert [path.name for path in disk.iterdir()] == ["state-00000001"]
        with pytest.raises(DiskFullError, match="3 more states"):
            check_room(disk, 10**6, keep_last=2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("lost_at", [1, 2])
def test_a_launch_that_lost_the_lock_publishes_nothing(tmp_path, lost_at):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == lost_at:
            raise RuntimeError("taken over")

    saver = StateSaver(asynchronous=True, check=check)
    with pytest.raises(RuntimeError, match="taken over"):
        saver.save(tmp_path / "state-00000001", snapshot_of(1))
        saver.drain()

    assert list(tmp_path.iterdir()) == []


def test_saving_a_step_again_replaces_its_state(tmp_path):
    folder = save(tmp_path / "state-00000004", 4)
    saver = StateSaver(asynchronous=False, check=allow)

    saver.save(folder, take_snapshot({"model": {"weight": torch.zeros(1)}}, {"global_step": 4}))

    assert load_state(folder).component("model")["weight"].tolist() == [0.0]
    assert list(tmp_path.iterdir()) == [folder]


# --- damage ---


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "facts.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "grow", "remove"])
def test_a_damaged_state_is_never_loaded(tmp_path, name, harm):
    path = save(tmp_path / "state-00000001", 1) / name
    if harm == "flip":
        flip_byte(path, at=20)
    elif harm == "truncate":
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()

    with pytest.raises(StateError, match="state-00000001"):
        load_state(path.parent)


@pytest.mark.parametrize("at", [3, 20, -3])
def test_damage_after_verifying_is_found_while_reading(tmp_path, at):
    state = load_state(save(tmp_path / "state-00000001", 1))
    flip_byte(state.folder / "model.safetensors", at=at)

    with pytest.raises(StateError, match=r"damaged.*resume from another"):
        for _ in state.tensors("model").items():
            pass


def test_tensors_of_a_component_are_read_one_at_a_time(tmp_path):
    saver = StateSaver(asynchronous=False, check=allow)
    tensors = {f"{number:02d}": torch.full((1000,), float(number)) for number in range(20)}
    saver.save(tmp_path / "state-00000001", take_snapshot({"model": tensors}, {"global_step": 1}))

    component, read = load_state(tmp_path / "state-00000001").tensors("model"), []
    for name, tensor in component.items():
        read.append(weakref.ref(tensor))
        assert torch.equal(tensor, tensors[name])
        assert sum(one() is not None for one in read) <= 2

    assert len(read) == 20
    assert shapes_of(component) == dict.fromkeys(tensors, (1000,))


def test_a_component_that_is_not_there_is_named(tmp_path):
    state = load_state(save(tmp_path / "state-00000001", 1))

    with pytest.raises(StateError, match=r"has no ema\.safetensors; it has .*model\.safetensors"):
        state.component("ema")


def test_the_newest_verified_state_is_chosen_by_its_manifest_not_its_name(tmp_path, caplog):
    save(tmp_path / "state-00000009", 3)
    save(tmp_path / "state-00000001", 5)
    flip_byte(save(tmp_path / "state-00000002", 8) / "model.safetensors")
    save(tmp_path / "state-00000099.partial-7", 99)
    (tmp_path / "state-00000050").mkdir()

    newest, problems = newest_verified(tmp_path.iterdir())

    assert newest.name == "state-00000001"
    assert {folder.name for folder, _ in problems} == {"state-00000050", "state-00000002"}
    assert "state-00000002 is not used" in caplog.text
    assert load_state(newest, is_verified=True).facts["global_step"] == 5


def test_no_state_that_verifies_is_an_error_with_the_reasons(tmp_path):
    flip_byte(save(tmp_path / "state-00000002", 8) / "model.safetensors")

    with pytest.raises(StateError, match=r"model\.safetensors: SHA-256"):
        newest_verified(tmp_path.iterdir())
    with pytest.raises(StateError, match="there is none"):
        newest_verified([])


# --- keeping and removing ---


def test_older_states_go_only_when_newer_ones_verify(tmp_path):
    for step in range(1, 6):
        save(tmp_path / f"state-{step:08d}", step)
    save(tmp_path / "final", 5)
    flip_byte(tmp_path / "state-00000005" / "model.safetensors")

    removed = retain(tmp_path, keep_last=2)

    assert [path.name for path in removed] == ["state-00000002", "state-00000001"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["final", "state-00000003", "state-00000004", "state-00000005"]


def test_nothing_is_removed_when_no_newer_state_verifies(tmp_path):
    for step in (1, 2):
        flip_byte(save(tmp_path / f"state-{step:08d}", step) / "model.safetensors")

    assert retain(tmp_path, keep_last=1) == []
    with pytest.raises(ValueError, match="keep_last"):
        retain(tmp_path, keep_last=0)


def test_a_saver_keeps_the_last_states(tmp_path):
    saver = StateSaver(asynchronous=True, check=allow, keep_last=2)

    for step in range(1, 6):
        saver.save(tmp_path / f"state-{step:08d}", snapshot_of(step))
    saver.drain()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000004", "state-00000005"]


def test_left_over_partial_folders_are_removed(tmp_path):
    save(tmp_path / "state-00000001", 1)
    (tmp_path / "state-00000002.partial-999").mkdir()
    (tmp_path / "state-00000002.partial-999" / "model.safetensors").write_bytes(b"half")

    assert [path.name for path in remove_partials(tmp_path)] == ["state-00000002.partial-999"]
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000001"]


def test_a_kill_between_the_two_renames_of_a_replacement_leaves_a_state(tmp_path, monkeypatch):
    folder = save(tmp_path / "final", 4)
    replace, calls = os.replace, []

    def die_at_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_second)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 4)
    monkeypatch.undo()

    assert not folder.exists()
    newest, _ = newest_verified(tmp_path.iterdir())
    assert newest.name.startswith("final.replaced-")
    save(folder, 4)
    retain(tmp_path, keep_last=1)
    assert list(tmp_path.iterdir()) == [folder]


# --- kill -9 ---

SAVE_FOREVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from training.state import StateSaver, take_snapshot
from training.state_folder import load_state, newest_verified

folder = Path(sys.argv[1])
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:  # each line: fork a child, kill it after so many seconds
    child = os.fork()
    if child == 0:
        states = [path for path in folder.iterdir() if ".partial-" not in path.name]
        step = load_state(newest_verified(states)[0]).facts["global_step"] if states else 0
        saver = StateSaver(asynchronous=True, check=lambda: None, keep_last=2,
                           on_saved=lambda path, digest: os.write(1, f"saved {path.name}\\n".encode()))
        while True:
            step += 1
            tensors = {"model": {"w": torch.full((200, 200), float(step))}, "optimizer": {"m": torch.full((9,), step)}}
            saver.save(folder / f"state-{step:08d}", take_snapshot(tensors, {"global_step": step}))
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(1, b"killed\\n")
"""


def test_after_kill_9_at_any_moment_the_newest_reported_state_or_a_newer_one_verifies(tmp_path):
    draw = random.Random(1)
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    reported, num_kills_inside = 0, 0
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(15):
            process.stdin.write(f"{draw.uniform(0.01, 0.15)}\n")
            process.stdin.flush()
            while (line := process.stdout.readline()) != "killed\n":
                reported = int(line.split("-")[1])
            num_kills_inside += any(".partial-" in path.name for path in tmp_path.iterdir())
            if reported == 0:
                continue
            states = [path for path in tmp_path.iterdir() if ".partial-" not in path.name]
            newest, problems = newest_verified(states)
            state = load_state(newest)
            step = state.facts["global_step"]
            assert problems == []
            assert step >= reported
            assert torch.equal(state.component("model")["w"], torch.full((200, 200), float(step)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    assert reported > 0
    assert num_kills_inside > 0  # kills did hit half-written states
    assert json.loads((newest / "manifest.json").read_text())["global_step"] == step
